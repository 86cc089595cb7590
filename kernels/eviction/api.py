"""Eviction of one slot a head: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from kvpress.kernels import operators, triton_support
from kvpress.kernels.dispatch import choose
from kvpress.kernels.eviction import native, reference


def weakest(
    scores: Tensor,
    positions: Tensor,
    *,
    sinks: int | Tensor = 0,
    first_recent: int | Tensor | None = None,
    lengths: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The slot of each head to evict: an empty one if there is any, else the lowest score, of equals the smallest
    position.

    NaN and `-inf` count as the lowest finite score, `+inf` as the largest. Protected slots (`position < sinks` or
    `position >= first_recent`) go only when a head holds no others, and then the smallest position goes.

    Args:
        scores: `[batch, kv_heads or 1, slots]` fp32, higher = keep.
        positions: `[batch, kv_heads or 1, slots]` int32 or int64, `-1` for an empty slot.
        sinks: an integer, or integers that broadcast to `[batch, kv_heads, 1]`.
        first_recent: likewise; with `newest` the last position and a window of `w`, `newest - w + 1`. `None`: no
            window.
        lengths: `[batch, kv_heads]` integer: a head's slots end here (ragged heads). `None`: all are its own.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[batch, kv_heads]` int64; of equal scores and positions the first slot; -1 for a head without slots.

    Raises:
        ValueError: shapes that do not fit, an unknown `impl`, or an explicit one that cannot serve.
    """
    if impl == "auto" and torch.compiler.is_compiling():
        return operators.weakest(scores, positions, _limit(sinks), _limit(first_recent), lengths)
    shape, other = scores.shape, positions.shape
    if len(shape) != 3 or len(other) != 3 or shape[0] != other[0] or shape[2] != other[2]:
        raise ValueError(
            f"scores and positions must be [batch, kv_heads or 1, slots], got {tuple(shape)}, {tuple(other)}"
        )
    kv_heads = max(shape[1], other[1])
    if shape[1] not in (1, kv_heads) or other[1] not in (1, kv_heads):
        raise ValueError(f"scores and positions must agree in KV heads, got {tuple(shape)} and {tuple(other)}")
    if lengths is not None and lengths.shape != (shape[0], kv_heads):
        raise ValueError(f"lengths must be [batch, kv_heads] = {(shape[0], kv_heads)}, got {tuple(lengths.shape)}")
    chosen = choose(
        "weakest slot",
        impl,
        {
            "native": lambda: native.refusal(scores, positions),
            "triton": lambda: triton_support.refusal(scores, positions),
            "reference": lambda: None,
        },
    )
    if chosen == "native":
        return native.weakest(scores, positions, sinks, first_recent, lengths)
    if chosen == "triton":
        slot: Tensor = import_module("kvpress.kernels.eviction.triton").weakest(
            scores, positions, sinks, first_recent, lengths
        )
        return slot
    return reference.weakest(scores, positions, sinks, first_recent, lengths)


def _limit(limit: int | Tensor | None) -> Tensor | None:
    return torch.tensor([[[limit]]]) if isinstance(limit, int) else limit
