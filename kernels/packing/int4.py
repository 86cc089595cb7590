"""int4 rows: turned channels, and queries as such rows meet them."""

from __future__ import annotations

import torch
from torch import Tensor

CODES_A_BYTE = 2
MULTIPLE = 8  # of which head sizes must be one
ZERO = 8  # what is added to a code of int4
QUERY_LEVELS = 127


def mixed_channels(rows: Tensor) -> Tensor:
    """Rows `[..., dim]` times a Walsh-Hadamard matrix, not normalised: each block of channels, of the greatest power of two that divides
    `dim`, becomes `block ** 0.5` times an orthogonal turn of itself. The order of the sums is fixed: all implementations agree bit for bit.
    """
    block, half = rows.shape[-1] & -rows.shape[-1], 1
    while half < block:
        pairs = rows.unflatten(-1, (-1, 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        rows = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return rows


def codes_of(rows: Tensor) -> Tensor:
    """Packed codes `[..., dim / 2]` uint8 as `[..., dim]` int8."""
    return torch.stack([rows & 15, rows >> 4], dim=-1).flatten(-2).to(torch.int8) - ZERO


def rounded_query(query: Tensor) -> Tensor:
    """`query [..., dim]` as int4 rows are multiplied with: its channels mixed, in fp32, and rounded to int8 with a scale a row."""
    wide = mixed_channels(query.float())
    scale = wide.abs().amax(dim=-1, keepdim=True) / torch.full_like(wide[..., :1], QUERY_LEVELS)
    return (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_() * scale
