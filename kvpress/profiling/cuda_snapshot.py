"""The history of a CUDA device's allocations, written for torch's viewer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_ENTRIES = 200_000


@contextmanager
def memory_history(device: torch.device, path: str | Path | None) -> Iterator[None]:
    """Record inside the block, write to `path` at its end; nothing for `None`.

    Raises:
        ValueError: another device than CUDA, or a file that exists; names the field.
    """
    if path is None:
        yield
        return
    target = Path(path)
    if device.type != "cuda":
        raise ValueError(f"cuda_snapshot needs a model on a CUDA device, this one is on {str(device)!r}")
    if target.exists():
        raise ValueError(f"cuda_snapshot must name a new file, {str(target)!r} exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(max_entries=_ENTRIES)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(target))
        torch.cuda.memory._record_memory_history(enabled=None)
