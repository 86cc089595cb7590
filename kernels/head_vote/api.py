"""Head vote: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels import operators, triton_support
from kvpress.kernels.dispatch import choose
from kvpress.kernels.head_vote import native, reference
from kvpress.kernels.packing.int4 import CODES_A_BYTE
from kvpress.kernels.shapes import check_query_and_slots, check_scales, check_slot_options


def head_vote(
    query: Tensor,
    keys: Tensor,
    *,
    scaling: float = 1.0,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    keys_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Votes for slots: the softmax over the visible slots of each query head, summed over heads (TokenSelect, arXiv
    2411.02886).

    Args:
        query: `[batch, query_heads, 1, dim]`; query head `h` belongs to KV head `h // (query_heads // kv_heads)`.
        keys: the slots, dense or flat (see `kvpress.kernels.shapes`); int8, or uint8 `[..., dim / 2]` of packed int4 (see
            `kvpress.kernels.packing.pack_int4`), with `keys_scale`. For int4 keys the query's channels are mixed as theirs are and rounded
            to int8, with a scale a head.
        scaling: factor of the dot products, or of a query that is rounded; the paper has none.
        positions: `[batch, kv_heads or 1, slots]`; candidates are the slots with `position >= 0`.
        query_positions, starts, lengths, keys_scale: as in `kvpress.kernels.attention.attend`.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[batch, slots]` in fp32 (fp64 for fp64 input); each query head with a candidate adds 1 in all.

    Raises:
        ValueError: shapes that do not fit, more than one row, an unknown `impl`, or an explicit one that cannot serve.
    """
    if impl == "auto" and torch.compiler.is_compiling():
        return operators.head_vote(query, keys, scaling, positions, query_positions, starts, lengths, keys_scale)
    packed = keys.dtype == torch.uint8
    kv_heads = check_query_and_slots(query, keys, keys, starts, lengths, channels=CODES_A_BYTE if packed else 1)
    if query.shape[2] != 1:
        raise ValueError(f"query must have a single row to vote, got {query.shape[2]}")
    slots = keys.shape[2] if starts is None else None
    check_slot_options(query.shape[0], kv_heads, 1, slots, positions, query_positions, lengths, None)
    bytes_held = keys.view(torch.int8) if packed else keys
    check_scales(bytes_held, bytes_held, keys_scale, keys_scale)
    chosen = choose(
        "head vote",
        impl,
        {
            "native": lambda: native.refusal(query, keys),
            "triton": lambda: triton_support.refusal(query, keys) or triton_support.storage_refusal(bytes_held, query),
            "reference": lambda: None,
        },
    )
    arguments: dict[str, Any] = {
        "scaling": scaling,
        "positions": positions,
        "query_positions": query_positions,
        "starts": starts,
        "lengths": lengths,
        "keys_scale": keys_scale,
    }
    if chosen == "native":
        return native.head_vote(query, keys, kv_heads=kv_heads, **arguments)
    if chosen == "triton":
        votes: Tensor = import_module("kvpress.kernels.head_vote.triton").head_vote(query, keys, **arguments)
        return votes
    return reference.head_vote(query, keys, **arguments)
