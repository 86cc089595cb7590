"""Pieces that the reference implementations share: layouts made dense, and scores with everything invisible at
`-inf`."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator_type(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64 input, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def scale_slots(slots: Tensor, scale: Tensor | None) -> Tensor:
    """Stored int8 rows times their scale (one a slot), in fp32; other rows as they are."""
    return slots if scale is None else slots.float() * scale.float()[..., None]


def flat_to_dense(
    keys: Tensor, values: Tensor, positions: Tensor | None, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Flat rows `[rows, dim]` to `[batch, kv_heads, longest, dim]`, and positions with `-1` past each head's length."""
    longest = int(lengths.max()) if lengths.numel() else 0
    slot = torch.arange(longest, device=keys.device)
    inside = slot < lengths[..., None].to(keys.device)
    rows = torch.where(inside, starts[..., None].to(keys.device) + slot, 0)
    known = inside.int() - 1 if positions is None else torch.where(inside, positions[..., :longest], -1)
    return keys[rows], values[rows], known


def select_slots(
    keys: Tensor, values: Tensor, positions: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The slots named by `index [batch, kv_heads or 1, n]`; where it is `-1` the position is `-1`."""
    batch, kv_heads = keys.shape[:2]
    index = index.long().expand(batch, kv_heads, -1)
    slot = index.clamp(min=0)
    if positions is None:
        chosen = torch.zeros_like(slot)
    else:
        chosen = positions.expand(batch, kv_heads, -1).gather(-1, slot)
    row = torch.arange(batch, device=keys.device)[:, None, None]
    head = torch.arange(kv_heads, device=keys.device)[None, :, None]
    return keys[row, head, slot], values[row, head, slot], torch.where(index >= 0, chosen, -1)


def slot_scores(
    query: Tensor,
    keys: Tensor,
    positions: Tensor | None,
    query_positions: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Scores `[batch, kv_heads, group, rows, slots]` in the accumulator type, `-inf` where a slot is not visible."""
    batch, query_heads, rows, dim = query.shape
    kv_heads = keys.shape[1]
    kind = accumulator_type(query)
    grouped = query.reshape(batch, kv_heads, query_heads // kv_heads, rows, dim).to(kind)
    scores = torch.einsum("bhgrd,bhsd->bhgrs", grouped, keys.to(kind)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_slots(positions, query_positions)
    return scores if visible is None else scores.masked_fill(~visible[:, :, None], -torch.inf)


def visible_slots(positions: Tensor | None, query_positions: Tensor | None) -> Tensor | None:
    """`[batch, kv_heads or 1, rows or 1, slots]` of bool: `0 <= position <= query_position`; `None` when all is
    visible."""
    if positions is None:
        return None
    held = (positions >= 0)[:, :, None, :]
    if query_positions is None:
        return held
    return held & (positions[:, :, None, :] <= query_positions[:, None, :, None])


def causal_positions(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Positions `[1, 1, slots]` and query positions `[1, rows]` under which the rows are the last slots, in order."""
    slots = torch.arange(keys.shape[2], device=keys.device)
    return slots[None, None], slots[None, keys.shape[2] - query.shape[2] :]
