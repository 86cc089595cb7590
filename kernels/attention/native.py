"""Attention over slots by the compiled CPU kernels (`kernels/native/attention_few.hpp`, `attention_many.hpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.native import extension
from kvpress.kernels.native import tensors as native
from kvpress.kernels.shapes import most_slots

REDUCTIONS = {"sum": 1, "mean": 2, "max": 3}
WEIGHTS_GROUP = 16  # query heads a KV head whose weights can be returned


def refusal(
    query: Tensor, keys: Tensor, values: Tensor, kv_heads: int, *, weights: bool = False, turned: bool = False
) -> str | None:
    """Why this implementation cannot serve, or `None`.

    Args:
        weights: the weights are to be returned.
        turned: keys are to be turned as they are read.
    """
    if turned and query.shape[1] // kv_heads * query.shape[2] > WEIGHTS_GROUP:
        return f"native attention turns keys for up to {WEIGHTS_GROUP} queries a KV head"
    if weights and query.shape[1] // kv_heads > WEIGHTS_GROUP:
        return f"native attention returns weights for groups up to {WEIGHTS_GROUP}, not {query.shape[1] // kv_heads}"
    return native.refusal(query, keys, values)


def narrow() -> bool:
    """Whether these kernels run without the vectors of AVX2 or AVX-512."""
    return extension is not None and extension.level() == "baseline"


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    kv_heads: int,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    index: Tensor | None,
    causal: bool = False,
    softcap: float | None,
    sinks: Tensor | None,
    keys_scale: Tensor | None,
    values_scale: Tensor | None,
    weights: str | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `kvpress.kernels.attention.attend`; the third value is that of `attend_with_weights` where `weights` asks for
    it. With `rotation` as `attend_turned`."""
    batch, query_heads, rows, _ = query.shape
    output = torch.empty(batch, query_heads, rows, values.shape[-1], dtype=query.dtype)
    lse = torch.empty(batch, query_heads, rows, dtype=torch.float32)
    reduced, entries = None, 0
    if weights is not None:
        entries = most_slots(keys, lengths) if index is None else index.shape[-1]
        reduced = torch.empty(batch, kv_heads, entries, dtype=torch.float32)
    fields, owners = native.attention_fields(
        query,
        keys,
        values,
        kv_heads=kv_heads,
        scaling=scaling,
        positions=positions,
        query_positions=query_positions,
        starts=starts,
        lengths=lengths,
        index=index,
        causal=causal,
        softcap=softcap,
        sinks=sinks,
        keys_scale=keys_scale,
        values_scale=values_scale,
        output=output.data_ptr(),
        lse=lse.data_ptr(),
        weights=0 if reduced is None else reduced.data_ptr(),
        reduction=0 if weights is None else REDUCTIONS[weights],
        entries=entries,
        rotation=rotation,
    )
    native.built().attention(*fields)
    del owners
    return output, lse, reduced
