"""Attention over slots by the `flash-attn` package, where it is installed: prefill over dense slots, and decoding of
ragged heads.

In the flat layout each KV head is a sequence of its own, with the query heads of its group as that sequence's heads.
Checked against the interface of flash-attn 2.7 (`flash_attn_func`, `flash_attn_varlen_func`).
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
MOST_DIM = 256


def installed() -> bool:
    """Whether the package can be imported; looked up on each call, so that it is never imported for nothing."""
    return find_spec("flash_attn") is not None


def refusal(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    index: Tensor | None,
    sinks: Tensor | None,
) -> str | None:
    """Why this implementation cannot serve, or `None`. What the positions say is read last: it waits for the GPU."""
    if not query.is_cuda:
        return f"flash-attn runs on CUDA devices, query is on {query.device}"
    if not installed():
        return "flash-attn is not installed"
    return unfit(query, keys, values, starts, index, sinks) or hidden(
        query, keys, positions, query_positions, starts, lengths
    )


def unfit(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, index: Tensor | None, sinks: Tensor | None
) -> str | None:
    """Why types, sizes or options do not fit, or `None`."""
    if query.dtype not in HALVES or not query.dtype == keys.dtype == values.dtype:
        return f"flash-attn takes fp16 or bf16 alike for all, got {query.dtype}, {keys.dtype} and {values.dtype}"
    if query.shape[-1] > MOST_DIM or query.shape[-1] % 8 or values.shape[-1] != query.shape[-1]:
        sizes = f"{query.shape[-1]} and {values.shape[-1]}"
        return f"flash-attn takes one head size, a multiple of 8 up to {MOST_DIM}, got {sizes}"
    if index is not None or sinks is not None:
        return "flash-attn has no index list and no sinks"
    if starts is None and query.shape[2] == 1:
        return (
            "flash-attn serves prefill of dense slots and decoding of ragged heads, not a single row over dense slots"
        )
    if starts is not None and query.shape[2] != 1:
        return f"flash-attn serves one row over ragged heads, got {query.shape[2]}"
    return None


def hidden(
    query: Tensor,
    keys: Tensor,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> str | None:
    """Why the positions call for a mask that flash-attn does not have, or `None`."""
    if starts is not None and lengths is not None:
        counts = lengths.flatten().long()
        if not bool(torch.equal(starts.flatten().long(), counts.cumsum(0) - counts)):
            return "flash-attn reads ragged heads that lie one after the other without gaps"
        if positions is None and query_positions is None:
            return None
        if positions is None:
            seen = query_positions >= 0 if query_positions is not None else torch.ones(1, dtype=torch.bool)
            return None if bool(seen.all()) else "flash-attn sees every slot of a ragged head, and a row sees none"
        inside = torch.arange(positions.shape[-1], device=positions.device) < lengths[..., None]
        seen = positions >= 0
        if query_positions is not None:
            seen = seen & (positions <= query_positions[:, None, :])
        return (
            None if bool((seen | ~inside).all()) else "flash-attn sees every slot of a ragged head, and some are hidden"
        )
    if positions is None:
        return None
    slots, rows = keys.shape[2], query.shape[2]
    if query_positions is None or rows > slots:
        return "flash-attn has no mask for empty slots"
    in_order = torch.arange(slots, device=positions.device)
    plain = (positions == in_order).all() & (query_positions == in_order[slots - rows :]).all()
    return (
        None if bool(plain) else "flash-attn is causal by slot: positions must be 0, 1, … and the rows the last of them"
    )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See `kvpress.kernels.attention.attend`; only for what `refusal` lets through."""
    package = import_module("flash_attn")
    common: dict[str, Any] = {
        "dropout_p": 0.0,
        "softmax_scale": scaling,
        "softcap": 0.0 if softcap is None else softcap,
        "return_attn_probs": True,
    }
    batch, query_heads, rows, dim = query.shape
    if starts is None or lengths is None:
        output, lse, _ = package.flash_attn_func(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            causal=positions is not None and query_positions is not None,
            **common,
        )
        return output.transpose(1, 2), _without_slots(lse)
    kv_heads = starts.shape[1]
    group = query_heads // kv_heads
    ends = lengths.flatten().cumsum(0).to(torch.int32)
    output, lse, _ = package.flash_attn_varlen_func(
        query.reshape(batch * kv_heads, group, dim),
        keys[:, None],
        values[:, None],
        cu_seqlens_q=torch.arange(batch * kv_heads + 1, dtype=torch.int32, device=query.device),
        cu_seqlens_k=torch.cat([ends.new_zeros(1), ends]),
        max_seqlen_q=1,
        max_seqlen_k=int(lengths.max()),
        causal=False,
        **common,
    )
    # the log-sum-exp of the variable-length call is [heads, rows in all]
    return output.reshape(batch, query_heads, rows, -1), _without_slots(lse.T.reshape(batch, query_heads, rows))


def _without_slots(lse: Tensor) -> Tensor:
    """flash-attn marks a row that saw nothing with `+inf`; here it is the log of an empty sum."""
    return lse.float().masked_fill(lse == torch.inf, -torch.inf)
