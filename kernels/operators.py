"""The operations as torch custom operators with fake implementations, so that `torch.compile` traces through them.

Eager calls do not come here: a custom operator's dispatch costs more than a small kernel. The public functions call an
operator only while a graph is captured; the operator, when it runs, calls the public function again.

An operator's parameters are those of the public function, in its order, all but `impl`: torch makes the schema of them. What makes an empty
result of them names only what it reads.
"""

import torch
from torch import Tensor
from torch.library import custom_op, get_ctx

from kvpress.kernels.pages.rounding import bounds_type
from kvpress.kernels.scores import accumulator_type

# schemas are made from annotations at run time: no `from __future__ import annotations` here


def _entries(keys: Tensor, lengths: Tensor | None, index: Tensor | None = None) -> int:
    if index is not None:
        return index.shape[-1]
    return keys.shape[2] if lengths is None else get_ctx().new_dynamic_size()  # type: ignore[return-value]


@custom_op("kvpress::attend", mutates_args=())
def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    index: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keys_scale: Tensor | None = None,
    values_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`kvpress.kernels.attention.attend` on an implementation that has the log-sum-exp: native, else the reference."""
    from kvpress.kernels.attention import api, native

    kv_heads = keys.shape[1] if starts is None else starts.shape[1]
    served = native.refusal(query, keys, values, kv_heads) is None
    output, lse = api.attend(
        query,
        keys,
        values,
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
        impl="native" if served else "reference",
    )
    if lse is None:
        raise RuntimeError("attention returned no log-sum-exp")
    return output, lse


@attend.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:3], values.shape[-1])
    return output, query.new_empty(query.shape[:3], dtype=accumulator_type(query))


@custom_op("kvpress::attend_with_weights", mutates_args=())
def attend_with_weights(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    reduction: str,
    scaling: float,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    index: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keys_scale: Tensor | None = None,
    values_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kvpress.kernels.attention.attend_with_weights`."""
    from kvpress.kernels.attention import api

    return api.attend_with_weights(
        query,
        keys,
        values,
        reduction=reduction,
        scaling=scaling,
        positions=positions,
        query_positions=query_positions,
        starts=starts,
        lengths=lengths,
        index=index,
        softcap=softcap,
        sinks=sinks,
        keys_scale=keys_scale,
        values_scale=values_scale,
    )


@attend_with_weights.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    reduction: str,
    scaling: float,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    index: Tensor | None = None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = accumulator_type(query)
    kv_heads = keys.shape[1] if starts is None else starts.shape[1]
    weights = query.new_empty(query.shape[0], kv_heads, _entries(keys, lengths, index), dtype=kind)
    output = query.new_empty(*query.shape[:3], values.shape[-1])
    return output, query.new_empty(query.shape[:3], dtype=kind), weights


@custom_op("kvpress::attention_mass", mutates_args=())
def attention_mass(
    query: Tensor,
    keys: Tensor,
    scaling: float,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keys_scale: Tensor | None = None,
    row_weights: Tensor | None = None,
    lse: Tensor | None = None,
    temperature: float = 1.0,
    noise_seed: int | None = None,
) -> Tensor:
    """`kvpress.kernels.attention_mass.attention_mass`."""
    from kvpress.kernels.attention_mass import api

    return api.attention_mass(
        query,
        keys,
        scaling=scaling,
        positions=positions,
        query_positions=query_positions,
        starts=starts,
        lengths=lengths,
        softcap=softcap,
        sinks=sinks,
        keys_scale=keys_scale,
        row_weights=row_weights,
        lse=lse,
        temperature=temperature,
        noise_seed=noise_seed,
    )


@attention_mass.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    scaling: float,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    *_: object,
) -> Tensor:
    return query.new_empty(*query.shape[:2], _entries(keys, lengths), dtype=accumulator_type(query))


@custom_op("kvpress::head_vote", mutates_args=())
def head_vote(
    query: Tensor,
    keys: Tensor,
    scaling: float = 1.0,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    keys_scale: Tensor | None = None,
) -> Tensor:
    """`kvpress.kernels.head_vote.head_vote`."""
    from kvpress.kernels.head_vote import api

    return api.head_vote(
        query,
        keys,
        scaling=scaling,
        positions=positions,
        query_positions=query_positions,
        starts=starts,
        lengths=lengths,
        keys_scale=keys_scale,
    )


@head_vote.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    scaling: float = 1.0,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    *_: object,
) -> Tensor:
    return query.new_empty(query.shape[0], _entries(keys, lengths), dtype=accumulator_type(query))


@custom_op("kvpress::page_bounds", mutates_args=())
def page_bounds(keys: Tensor, page_size: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`kvpress.kernels.pages.page_bounds`."""
    from kvpress.kernels.pages import api

    return api.page_bounds(keys, page_size=page_size, positions=positions)


@page_bounds.register_fake
def _(keys: Tensor, page_size: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = (*keys.shape[:2], (keys.shape[2] + page_size - 1) // page_size, keys.shape[3])
    kind = bounds_type(keys.dtype)
    return keys.new_empty(shape, dtype=kind), keys.new_empty(shape, dtype=kind)


@custom_op("kvpress::page_scores", mutates_args=())
def page_scores(query: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """`kvpress.kernels.pages.page_scores`."""
    from kvpress.kernels.pages import api

    return api.page_scores(query, lowest, highest)


@page_scores.register_fake
def _(query: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:2], lowest.shape[2], dtype=accumulator_type(query))


@custom_op("kvpress::rotate", mutates_args=())
def rotate(
    slots: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None = None, inverse: bool = False
) -> Tensor:
    """`kvpress.kernels.rotation.rotate`."""
    from kvpress.kernels.rotation import api

    return api.rotate(slots, cosine, sine, positions=positions, inverse=inverse)


@rotate.register_fake
def _(slots: Tensor, *_: object) -> Tensor:
    return slots.new_empty(slots.shape)


# its schema in words: torch 2.6 cannot read it from `list[Tensor]`
@custom_op("kvpress::compact", mutates_args=(), schema="(Tensor[] columns, Tensor index) -> Tensor[]")
def compact(columns: list[Tensor], index: Tensor) -> list[Tensor]:
    """`kvpress.kernels.compaction.compact`."""
    from kvpress.kernels.compaction import api

    return api.compact(columns, index)


@compact.register_fake
def _(columns: list[Tensor], index: Tensor) -> list[Tensor]:
    return [column.new_empty(*column.shape[:2], index.shape[-1], *column.shape[3:]) for column in columns]


@custom_op("kvpress::weakest", mutates_args=())
def weakest(
    scores: Tensor,
    positions: Tensor,
    sinks: Tensor,
    first_recent: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`kvpress.kernels.eviction.weakest`, its limits as tensors."""
    from kvpress.kernels.eviction import api

    return api.weakest(scores, positions, sinks=sinks, first_recent=first_recent, lengths=lengths)


@weakest.register_fake
def _(scores: Tensor, positions: Tensor, *_: object) -> Tensor:
    kv_heads = max(scores.shape[1], positions.shape[1])
    return scores.new_empty(scores.shape[0], kv_heads, dtype=torch.int64)
