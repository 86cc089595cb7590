"""Rotation in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.scores import accumulator_type


def rotate(slots: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """See `kvpress.kernels.rotation.rotate`."""
    kind = accumulator_type(slots)
    rotary = cosine.shape[-1]
    if positions is not None:
        cosine, sine = cosine[positions.clamp(min=0)], sine[positions.clamp(min=0)]
    cosine, sine = cosine.to(kind), sine.to(kind) * (-1 if inverse else 1)
    turned = slots[..., :rotary].to(kind)
    half = torch.cat([-turned[..., rotary // 2 :], turned[..., : rotary // 2]], dim=-1)
    turned = (turned * cosine + half * sine).to(slots.dtype)
    if positions is not None:
        turned = torch.where((positions < 0)[..., None], slots[..., :rotary], turned)
    return torch.cat([turned, slots[..., rotary:]], dim=-1)
