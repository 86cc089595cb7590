"""LongBench's classification score: the share of the true class among the classes that the answer names."""

from collections.abc import Sequence


def classification_score(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / (classes named) if the true class is named, else 0; parts of the true class's own name do not count.

    The official code removes entries from a list while it walks over it, and so skips the entry after each
    removed one; the walk here does the same, because published scores depend on it.
    """
    named = [name for name in classes if name in prediction]
    position = 0
    while position < len(named):
        name = named[position]
        if name in reference and name != reference:
            named.remove(name)
        position += 1
    return 1.0 / len(named) if reference in named else 0.0
