"""What holds for all tests. `KVPRESS_TEST_DEVICE=cuda`: they make their tensors and models on that device."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("KVPRESS_TEST_DEVICE", "cpu")
ROOT = Path(__file__).parents[1]
OURS = (str(ROOT / "tests"), str(ROOT / "kvpress" / "testing"))


class MadeOnDevice(TorchFunctionMode):
    """Tensors that test files make without naming a device lie on `device`; what the package makes is left as it is."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.makers = _device_constructors()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = function in self.makers
        if not made or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        caller = Path(sys._getframe(1).f_code.co_filename).resolve()
        if not str(caller).startswith(OURS):
            return function(*args, **kwargs)
        return function(*args, **kwargs).to(self.device)  # made on the CPU first: the same random numbers everywhere


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE == "cpu":
        return
    if torch.device(DEVICE).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"KVPRESS_TEST_DEVICE={DEVICE}: torch sees no CUDA device")
    mode = MadeOnDevice(DEVICE)
    mode.__enter__()
    config.add_cleanup(lambda: mode.__exit__(None, None, None))


def pytest_collection_finish() -> None:
    """What was imported stays: collections, of which some tests ask for many, need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """So that the end of the process finds everything."""
    gc.unfreeze()
