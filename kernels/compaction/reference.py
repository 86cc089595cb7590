"""Compaction in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(slots: Tensor, index: Tensor) -> Tensor:
    """One column; see `kvpress.kernels.compaction.compact`."""
    batch, kv_heads = slots.shape[:2]
    index = index.long().expand(batch, kv_heads, -1)
    b = torch.arange(batch, device=slots.device)[:, None, None]
    h = torch.arange(kv_heads, device=slots.device)[None, :, None]
    rows = slots[b, h, index.clamp(min=0)]
    absent = index < 0
    return rows.masked_fill(absent if slots.dim() == 3 else absent[..., None], 0)
