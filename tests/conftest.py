"""What holds for all tests."""

import gc


def pytest_collection_finish() -> None:
    """What was imported stays: collections, of which some tests ask for many, need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """So that the end of the process finds everything."""
    gc.unfreeze()
