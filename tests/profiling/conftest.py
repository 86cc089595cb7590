"""A tiny checkpoint for commands, one thread for everything."""

from collections.abc import Iterator

import pytest
import torch

from kvpress.testing.tiny_checkpoint import save_tiny_checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model and its tokenizer."""
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))
