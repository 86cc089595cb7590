"""Host memory that goes back to the system when it is freed.

A freed buffer of the C library's heap may stay with the process for as long as something allocated later lies behind it, and a block of a
cache lives much longer than the activations around it: limits would hold on paper only. Large buffers are therefore mapped on their own.
"""

import mmap

import torch
from torch import Tensor

LEAST = 64 << 10  # bytes: smaller buffers come from the heap


def page_bytes(nbytes: int) -> int:
    """Bytes that a buffer of `nbytes` really takes."""
    return nbytes if nbytes < LEAST else -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def empty_pages(nbytes: int) -> Tensor:
    """A flat uint8 buffer in host memory. Raises MemoryError or OSError when there is none."""
    if nbytes < LEAST:
        return torch.empty(nbytes, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
