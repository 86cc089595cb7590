"""What int4 rows stand for, once more: in fp64, by a matrix that is written out."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(dim: int) -> Tensor:
    """`[dim, dim]` of fp64, orthogonal: in each block of the greatest power of two that divides `dim`, the sign of entry `(i, j)` is the
    parity of the bits that `i` and `j` share."""
    block = 1
    while dim % (2 * block) == 0:
        block *= 2
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    one = torch.tensor(signs, dtype=torch.float64) / block**0.5
    whole: Tensor = torch.block_diag(*[one] * (dim // block))
    return whole


def rounded(rows: Tensor, levels: int) -> Tensor:
    """`rows [..., dim]` turned, rounded so that a row's largest magnitude is `levels` steps, and turned back, in fp64."""
    turn = hadamard(rows.shape[-1])
    turned = rows.double() @ turn
    scale = turned.abs().amax(dim=-1, keepdim=True) / levels
    return torch.where(scale > 0, (turned / scale).round() * scale, 0.0) @ turn.T
