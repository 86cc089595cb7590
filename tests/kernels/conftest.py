"""One thread, the instruction sets of this machine, and memory that is NaN until it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvpress.kernels.native import extension


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["not built"] if extension is None else extension.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that the extension was compiled for and this machine can run."""
    if extension is None:
        pytest.skip("the native kernels are not built")
    before = extension.level()
    extension.use_level(request.param)
    yield request.param
    extension.use_level(before)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`torch.empty` gives NaN (or the largest integer): what a kernel forgets to write is seen. Returns the counted
    calls."""
    plain, calls = torch.empty, [0]

    def filled(*sizes: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        tensor = plain(*sizes, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", filled)
    return calls
