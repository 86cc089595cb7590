"""Attention over dense slots through torch's fused `scaled_dot_product_attention`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpress.kernels.scores import causal_positions, visible_slots

ROWS = 1024  # query rows whose mask is held at once
PACK_BYTES = 8 << 20  # CPU: for larger keys, reading them once a group wins over spreading query heads on threads


def refusal(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    softcap: float | None,
    sinks: Tensor | None,
    starts: Tensor | None,
    index: Tensor | None,
) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    if not query.dtype == keys.dtype == values.dtype:
        return "torch's fused attention takes query, keys and values of one type"
    if softcap is not None or sinks is not None:
        return "torch's fused attention has no softcap and no sinks"
    if starts is not None or index is not None:
        return "torch's fused attention reads dense slots only"
    return None


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    causal: bool,
) -> Tensor:
    """Attention as `kvpress.kernels.attention.attend` describes it, without the log-sum-exp."""
    rows = query.shape[2]
    if causal and rows == keys.shape[2]:
        grouped = query.shape[1] != keys.shape[1]
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped)
    if causal:
        positions, query_positions = causal_positions(query, keys)
    if positions is None:
        return _unmasked(query, keys, values, scaling)
    outputs = []
    for first in range(0, rows, ROWS):
        row_positions = None if query_positions is None else query_positions[:, first : first + ROWS]
        outputs.append(_masked(query[:, :, first : first + ROWS], keys, values, positions, row_positions, scaling))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _unmasked(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    batch, query_heads, rows, dim = query.shape
    kv_heads = keys.shape[1]
    if kv_heads == query_heads:
        return scaled_dot_product_attention(query, keys, values, scale=scaling)
    if rows == 1 and keys.device.type == "cpu" and keys.numel() * keys.element_size() > PACK_BYTES:
        packed = query.reshape(batch, kv_heads, query_heads // kv_heads, dim)
        return scaled_dot_product_attention(packed, keys, values, scale=scaling).reshape(batch, query_heads, 1, -1)
    return scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)


def _masked(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    query_positions: Tensor | None,
    scaling: float,
) -> Tensor:
    """A group's rows are packed into one KV head, so that the mask exists once a KV head and not once a query head."""
    batch, query_heads, rows, dim = query.shape
    kv_heads = keys.shape[1]
    group = query_heads // kv_heads
    visible = visible_slots(positions, query_positions)
    if visible is None or visible.shape[2] == 1:
        packed, mask = query.reshape(batch, kv_heads, group * rows, dim), visible
    else:
        packed = query.reshape(batch, kv_heads, group * rows, dim)
        mask = visible[:, :, None].expand(-1, -1, group, -1, -1).reshape(*visible.shape[:2], group * rows, -1)
    output = scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
    return output.reshape(batch, query_heads, rows, -1)
