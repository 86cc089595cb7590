"""Host memory that goes back to the system when it is freed.

A freed buffer of the C library's heap may stay with the process for as long as something allocated later lies behind it, and the slots of a
cache live much longer than the activations around them: limits would hold on paper only. Large buffers are therefore mapped on their own,
and with offload what the model's own keys and values leave behind in the heap is given back.
"""

import ctypes
import mmap

import torch
from torch import Tensor

LEAST = 64 << 10  # bytes: smaller buffers come from the heap
# a forked process has its own copy, as of any memory; the default would let it write into its parent's (Windows knows neither)
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has such a function, and needs it


def page_bytes(nbytes: int) -> int:
    """Bytes that a buffer of `nbytes` really takes."""
    return nbytes if nbytes < LEAST else -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def empty_pages(nbytes: int, *, aligned: int = 1) -> Tensor:
    """A flat uint8 buffer in host memory, at a multiple of `aligned` bytes. Raises MemoryError or OSError when there is none."""
    if nbytes < LEAST:
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes + aligned - 1, **_PRIVATE)  # what is never touched takes no memory
    start = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % aligned
    return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=start)


def give_back_freed() -> None:
    """Return freed memory of the C library's heap to the system. Takes milliseconds: without it the keys and values that a prompt's layers
    let go stay with the process, since a few bytes that live on lie in the place of each."""
    if _trim is not None:
        _trim(0)
