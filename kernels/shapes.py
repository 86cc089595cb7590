"""Checks that every operation makes of its arguments, and the layout of slots they share.

Slots come in one of two layouts:

- *dense*: ``keys [batch, kv_heads, slots, dim]``, any strides with a contiguous last dimension;
- *flat*: ``keys [rows, dim]`` with ``starts [batch, kv_heads]`` and ``lengths [batch, kv_heads]`` (integers): the slots
  of head ``h`` of row ``b`` are the rows ``starts[b, h] … starts[b, h] + lengths[b, h] - 1``. Heads need not be equally
  long.

``positions [batch, kv_heads or 1, slots]`` holds the original position of each slot, ``-1`` for an empty one; in the
flat layout it is padded to the longest head and what lies past ``lengths`` is ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def most_slots(keys: Tensor, lengths: Tensor | None) -> int:
    """Slots of the longest head, in either layout."""
    if lengths is None:
        return keys.shape[2]
    return int(lengths.max()) if lengths.numel() else 0


def check_query_and_slots(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, lengths: Tensor | None, channels: int = 1
) -> int:
    """Return the number of KV heads; raise `ValueError` naming the argument, the rule and what was given. `channels` lie in each element of
    the keys."""
    if query.dim() != 4:
        raise ValueError(f"query must be [batch, query_heads, rows, dim], got shape {tuple(query.shape)}")
    if (starts is None) != (lengths is None):
        raise ValueError("starts and lengths describe the flat layout together: give both or neither")
    if starts is None:
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                "keys and values must be [batch, kv_heads, slots, dim] with equal leading sizes, "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        kv_heads = keys.shape[1]
        if keys.shape[0] != query.shape[0]:
            raise ValueError(f"keys must have the batch size of query ({query.shape[0]}), got {keys.shape[0]}")
    else:
        if keys.dim() != 2 or values.dim() != 2 or keys.shape[0] != values.shape[0]:
            raise ValueError(
                "in the flat layout keys and values must be [rows, dim] with equal rows, "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        kv_heads = starts.shape[1]
    if kv_heads == 0 or query.shape[1] % kv_heads:
        raise ValueError(f"query heads ({query.shape[1]}) must be a multiple of KV heads ({kv_heads})")
    if query.shape[-1] != keys.shape[-1] * channels:
        raise ValueError(
            f"query and keys must share the last size, got {query.shape[-1]} and {keys.shape[-1] * channels}"
        )
    return kv_heads


def check_scales(keys: Tensor, values: Tensor, keys_scale: Tensor | None, values_scale: Tensor | None) -> None:
    """int8 slots come with one scale a slot (`[batch, kv_heads, slots]`, or `[rows]` in the flat layout), others with
    none."""
    for name, slots, scale in (("keys", keys, keys_scale), ("values", values, values_scale)):
        if (slots.dtype == torch.int8) != (scale is not None):
            raise ValueError(
                f"{name}_scale must be given for int8 {name} and for no other type, {name} are {slots.dtype}"
            )
        if scale is not None and scale.shape != slots.shape[:-1]:
            raise ValueError(
                f"{name}_scale must have the shape of {name} without the last size, {tuple(slots.shape[:-1])}, "
                f"got {tuple(scale.shape)}"
            )


def check_slot_options(
    batch: int,
    kv_heads: int,
    rows: int,
    slots: int | None,
    positions: Tensor | None,
    query_positions: Tensor | None,
    lengths: Tensor | None,
    index: Tensor | None,
) -> None:
    """Shapes of what says which slots exist and who sees them; `slots` is `None` in the flat layout."""
    if lengths is not None and lengths.shape != (batch, kv_heads):
        raise ValueError(
            f"starts and lengths must be [batch, kv_heads] = {(batch, kv_heads)}, got {tuple(lengths.shape)}"
        )
    if positions is not None:
        shape = positions.shape
        fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, kv_heads)
        if not fits or (slots is not None and shape[2] != slots):
            raise ValueError(
                f"positions must be [batch, kv_heads or 1, slots] = {(batch, kv_heads, slots)}, got {tuple(shape)}"
            )
    if query_positions is not None:
        shape = query_positions.shape
        if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] != rows:
            raise ValueError(f"query_positions must be [batch or 1, rows] = {(batch, rows)}, got {tuple(shape)}")
    if index is not None:
        shape = index.shape
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, kv_heads):
            raise ValueError(
                f"index must be [batch, kv_heads or 1, n] = {(batch, kv_heads)} + (n,), got {tuple(shape)}"
            )
