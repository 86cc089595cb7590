"""Choosing slots by the compiled CPU kernels (`kernels/native/choosing.cpp`, `products.hpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.native import missing
from kvpress.kernels.native import tensors as native

NO_OPERATOR = "torch.compile cannot trace through these kernels"


def vote_refusal(query: Tensor, keys: Tensor) -> str | None:
    """Why no native kernel can vote on these keys, or `None`."""
    return NO_OPERATOR if torch.compiler.is_compiling() else native.vote_refusal(query, keys)


def refusal(query: Tensor, keys: Tensor) -> str | None:
    """Why no native kernel can multiply these, or `None`."""
    if torch.compiler.is_compiling():
        return NO_OPERATOR
    return native.refusal(query, keys, keys)


def scores_refusal(scores: Tensor) -> str | None:
    """Why no native kernel can choose by these scores, or `None`."""
    if missing is not None or torch.compiler.is_compiling():
        return missing or NO_OPERATOR
    if not scores.is_cpu:
        return "native kernels read host memory only"
    return None if scores.dtype == torch.float32 else f"native kernels take fp32 scores, not {scores.dtype}"


def reuse_refusal(query: Tensor, former: Tensor, live: Tensor, chosen: Tensor) -> str | None:
    """Why no native kernel can say whether these serve once more, or `None`."""
    if missing is not None or torch.compiler.is_compiling():
        return missing or NO_OPERATOR
    if not (query.is_cpu and former.is_cpu and live.is_cpu and chosen.is_cpu):
        return "native kernels read host memory only"
    if query.dtype not in native.FLOATS or live.dtype != torch.bool or chosen.dtype != torch.int64:
        return f"native kernels take fp32, bf16 and fp16 queries, not {query.dtype}, bool rows and int64 slots"
    if query.stride()[-1] != 1 or not (former.is_contiguous() and live.is_contiguous() and chosen.is_contiguous()):
        return "native kernels need contiguous memory"
    return None


def list_refusal(chosen: Tensor) -> str | None:
    """Why no native kernel can list these slots, or `None`."""
    if missing is not None or torch.compiler.is_compiling():
        return missing or NO_OPERATOR
    fits = chosen.is_cpu and chosen.dtype == torch.int64 and chosen.is_contiguous()
    return None if fits else "native kernels list contiguous int64 slots in host memory"


def best_slots(scores: Tensor, count: int) -> Tensor:
    """See `kvpress.kernels.choosing.best_slots`."""
    shape = scores.shape
    if len(shape) > 2 or scores.stride()[-1] != 1:
        scores = scores.reshape(-1, shape[-1]).contiguous()
    slots = torch.empty(*shape[:-1], count, dtype=torch.int64)
    rows = scores.numel() // shape[-1] if shape[-1] else 0
    stride = scores.stride()[0] if len(scores.shape) == 2 else 0
    native.built().best_slots(
        torch.get_num_threads(), rows, shape[-1], count, scores.data_ptr(), stride, slots.data_ptr()
    )
    return slots


def largest_products(query: Tensor, keys: Tensor, positions: Tensor | None, keys_scale: Tensor | None) -> Tensor:
    """See `kvpress.kernels.choosing.largest_products`."""
    batch, kv_heads, slots, _ = keys.shape
    products = torch.empty(batch, kv_heads, slots, dtype=torch.float32)
    fields, owners = native.attention_fields(
        query,
        keys,
        keys,
        kv_heads=kv_heads,
        positions=positions,
        keys_scale=keys_scale,
        weights=products.data_ptr(),
        entries=slots,
    )
    native.built().group_products(*fields)
    del owners
    return products


def reused_slots(
    query: Tensor,
    former: Tensor,
    live: Tensor,
    chosen: Tensor,
    threshold: float,
    sinks: int,
    local: int,
    slots: int,
) -> Tensor | None:
    """See `kvpress.kernels.choosing.reused_slots`."""
    batch, heads, _, dim = query.shape
    strides = query.stride()
    index, listed = _list(chosen, sinks, local, slots)
    serves: bool = native.built().reused_slots(
        batch,
        heads,
        dim,
        threshold,
        query.data_ptr(),
        native.FLOATS[query.dtype],
        strides[0],
        strides[1],
        former.data_ptr(),
        live.data_ptr(),
        *listed,
    )
    return index if serves else None


def listed_slots(chosen: Tensor, sinks: int, local: int, slots: int) -> Tensor:
    """See `kvpress.kernels.choosing.listed_slots`."""
    index, listed = _list(chosen, sinks, local, slots)
    native.built().listed_slots(*listed)
    return index


def _list(chosen: Tensor, sinks: int, local: int, slots: int) -> tuple[Tensor, tuple[int, ...]]:
    """An index of sinks, chosen slots and the last ones, and the fields by which it is filled."""
    batch, lists, top_k = chosen.shape
    index = torch.empty(batch, lists, sinks + top_k + local, dtype=torch.int64)
    return index, (batch * lists, sinks, top_k, local, slots, chosen.data_ptr(), index.data_ptr())
