"""Helpers of the offload tests: small blocks, and children that may be killed."""

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvpress.offload.key import BlockKey
from kvpress.offload.manager import TierManager
from kvpress.offload.row_source import RowSource
from kvpress.offload.slot_rows import NAME, RowLayout
from kvpress.offload.working import StoredBlock

torch.set_num_threads(1)


def make_tensors(seed: int, slots: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "key": torch.randn(2, slots, 4, generator=generator).to(torch.bfloat16),
        "value": torch.randn(2, slots, 4, generator=generator).to(torch.float16),
        "score": torch.randn(2, slots, generator=generator),
        "position": torch.randint(0, 1 << 40, (2, slots), generator=generator),
        "code": torch.randint(-128, 128, (2, slots, 3), generator=generator, dtype=torch.int8),
    }


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def are_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bytes; NaN equals NaN."""
    if left.keys() != right.keys():
        return False
    for name, tensor in left.items():
        other = right[name]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return False
        if not torch.equal(as_bytes(tensor), as_bytes(other)):
            return False
    return True


def run_child(work: Callable[[], object]) -> tuple[int, str]:
    """Run `work` in a forked child. Returns the signal that ended it (0 for none) and what it returned or raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            try:
                text = str(work())
                status = 0
            except BaseException:
                text = traceback.format_exc()
            os.write(writer, text.encode()[-60000:])
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), text


def put_rows_of(manager: TierManager, blocks: int, slots: int, dim: int = 8) -> tuple[RowSource, Tensor]:
    """Blocks of slot rows, put for the owner "me": their source, and all rows `[blocks, slots, width]`."""
    stored, written = [], []
    for number in range(blocks):
        key, generator = BlockKey("c", 0, number), torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(1, 2, slots, dim, generator=generator) for name in ("key", "value")}
        layout = RowLayout.of(tensors, slots, together=True)
        rows = torch.empty(layout.shape(1), dtype=torch.uint8)
        layout.pack(tensors, rows, key)
        manager.put(key, {NAME: rows}, "me")
        stored.append(StoredBlock((((NAME,), key),), 1, layout=layout))
        written.append(rows[0, 0])
    source = RowSource(layout)
    source.follow(stored)
    return source, torch.stack(written)


def bytes_below(folder: Path) -> int:
    return sum(path.stat(follow_symlinks=False).st_size for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture
def tensors_of() -> Callable[..., dict[str, Tensor]]:
    return make_tensors


@pytest.fixture
def put_rows() -> Callable[..., tuple[RowSource, Tensor]]:
    return put_rows_of


@pytest.fixture
def same() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], bool]:
    return are_same


@pytest.fixture
def in_child() -> Callable[[Callable[[], object]], tuple[int, str]]:
    return run_child


@pytest.fixture
def bytes_in() -> Callable[[Path], int]:
    return bytes_below


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty directory, in memory where the machine has such a file system: caches write thousands of tiny files."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        yield Path(name)
