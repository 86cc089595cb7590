"""Compaction on GPUs: the kept slots of each head, gathered into memory of their own."""

from __future__ import annotations

from torch import Tensor

from kvpress.kernels.compaction import triton_kernels
from kvpress.kernels.triton_support import on_device, power_of_two, strides

BLOCK_ELEMENTS = 4096  # elements of a tile


def compact(slots: Tensor, index: Tensor) -> Tensor:
    """The slots that `index` names, `[batch, kv_heads, n, dim]` (or without `dim`, as `slots`), contiguous.

    Args:
        slots: `[batch, kv_heads, slots, dim]`, or `[batch, kv_heads, slots]` as scales and positions are; of any type.
        index: `[batch, kv_heads or 1, n]` integer; `-1` gives zeros.
    """
    rows = slots if slots.dim() == 4 else slots[..., None]
    batch, kv_heads, _, dim = rows.shape
    kept = index.shape[-1]
    output = rows.new_empty(batch, kv_heads, kept, dim)
    if output.numel():
        block_d = power_of_two(dim)
        block_n = max(1, BLOCK_ELEMENTS // block_d)
        with on_device(slots):
            triton_kernels.gather_kernel[(-(-kept // block_n), batch * kv_heads)](
                rows, index, output, kept, **strides("s", rows, "bhsd"), **strides("i", index, "bhs"),
                HEADS=kv_heads, DIM=dim, BLOCK_N=block_n, BLOCK_D=block_d,
            )  # fmt: skip
    return output if slots.dim() == 4 else output[..., 0]
