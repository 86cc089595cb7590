"""The type in which bounds of keys are held, and numbers rounded to it outwards: a bound stays a bound."""

from __future__ import annotations

import torch
from torch import Tensor

_LOWER_HALF = 0xFFFF  # the bits of an fp32 number that bfloat16 has not


def bounds_type(keys: torch.dtype) -> torch.dtype:
    """bfloat16 for fp32 keys, at half their bytes; else the type of the keys, in which they are exact."""
    return torch.bfloat16 if keys == torch.float32 else keys


def rounded_down(numbers: Tensor) -> Tensor:
    """The largest numbers of `bounds_type` that are not above `numbers`; NaN stays NaN."""
    return _rounded(numbers, below_zero=True)


def rounded_up(numbers: Tensor) -> Tensor:
    """The smallest numbers of `bounds_type` that are not below `numbers`; NaN stays NaN. Above the range that is `+inf`."""
    return _rounded(numbers, below_zero=False)


def _rounded(numbers: Tensor, below_zero: bool) -> Tensor:
    """Toward zero where the bits that go are 0, or where the sign is not the one that is asked about; else away from it."""
    if numbers.dtype != torch.float32:
        return numbers
    bits = numbers.view(torch.int32)
    away = ((bits < 0) == below_zero) & (bits & _LOWER_HALF != 0) & ~numbers.isnan()
    shorter = (bits & ~_LOWER_HALF) + away.int() * (_LOWER_HALF + 1)
    return shorter.view(torch.float32).masked_fill(numbers.isnan(), torch.nan).to(torch.bfloat16)
