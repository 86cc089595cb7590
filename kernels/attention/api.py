"""Attention over the slots of a layer: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels import operators, triton_support
from kvpress.kernels.attention import flash, fused, native, reference
from kvpress.kernels.dispatch import announced, choose
from kvpress.kernels.scores import causal_positions
from kvpress.kernels.shapes import check_query_and_slots, check_scales, check_slot_options

FUSED_REFUSAL = ("softcap", "sinks", "starts", "index")
FUSED = ("scaling", "positions", "query_positions")
FLASH_REFUSAL = ("positions", "query_positions", "starts", "lengths", "index", "sinks")
FLASH = ("scaling", "positions", "query_positions", "starts", "lengths", "softcap")


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
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
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of `query` over slots.

    Args:
        query: `[batch, query_heads, rows, dim]`; query head `h` belongs to KV head `h // (query_heads // kv_heads)`.
        keys, values: the slots, dense or flat (see `kvpress.kernels.shapes`); `values` may have another last size.
            Their type may be narrower than that of `query`: fp32, bf16, fp16 or, with scales, int8.
        scaling: factor of the dot products.
        positions: `[batch, kv_heads or 1, slots]` integer; `-1` marks an empty slot. `None`: every slot holds a token.
        query_positions: `[batch or 1, rows]` integer; a slot is visible when `0 <= position <= query_position`.
            `None`: every token is.
        starts, lengths: `[batch, kv_heads]` integer, of the flat layout.
        index: `[batch, kv_heads or 1, n]` integer: attend to these slots only; `-1` is no slot, a slot listed twice
            counts twice.
        causal: the query rows are the last slots, in order: row `i` sees the first `slots - rows + i + 1` slots.
            Excludes `positions`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[query_heads]` logits that take part in the softmax and carry no value (gpt-oss).
        keys_scale, values_scale: of int8 slots: the factor of each slot's row, `[batch, kv_heads, slots]` or flat
            `[rows]`.
        impl: `"auto"` or the name of an implementation.

    Returns:
        Output `[batch, query_heads, rows, value_dim]` in the type of `query`, and the log-sum-exp
        `[batch, query_heads, rows]` in fp32 (fp64 for fp64 input) of the capped scores, sinks included, or `None` where
        the implementation has none. A row that sees no slot gives 0 (and a log-sum-exp of `-inf`, or of its sink).

    Raises:
        ValueError: shapes that do not fit, an unknown `impl`, or an explicit `impl` that cannot serve these arguments.
        IndexError: `index` names a slot that does not exist.
    """
    if impl == "auto" and torch.compiler.is_compiling():
        return operators.attend(
            query, keys, values, scaling, positions, query_positions, starts, lengths, index, causal, softcap, sinks,
            keys_scale, values_scale,
        )  # fmt: skip
    kv_heads = _check(
        query, keys, values, positions, query_positions, starts, lengths, index, sinks, keys_scale, values_scale
    )
    if causal and (positions is not None or starts is not None or index is not None):
        raise ValueError("causal describes dense slots in order: it excludes positions, starts and index")
    whole = causal and query.shape[2] == keys.shape[2]
    products = whole and query.is_cpu and native.narrow()  # torch's blocked matrix products win over narrow vectors
    if impl == "auto" and not products and announced("attention", "native"):  # the path of every decoded token
        if native.refusal(query, keys, values, kv_heads) is None:
            return native.attend(
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
            )[:2]
    arguments: dict[str, Any] = {
        "scaling": scaling,
        "positions": positions,
        "query_positions": query_positions,
        "starts": starts,
        "lengths": lengths,
        "index": index,
        "softcap": softcap,
        "sinks": sinks,
        "keys_scale": keys_scale,
        "values_scale": values_scale,
    }
    refusals: dict[str, Callable[[], str | None]] = {
        "native": lambda: native.refusal(query, keys, values, kv_heads),
        "flash": lambda: _flash_refusal(query, keys, values, causal, arguments),
        "triton": lambda: triton_support.refusal(query, keys, values) or triton_support.storage_refusal(keys, values),
        "fused": lambda: fused.refusal(query, keys, values, **_taken(arguments, FUSED_REFUSAL)),
        "reference": lambda: None,
    }
    if products:
        refusals = {"fused": refusals["fused"], **refusals}
    chosen = choose("attention", impl, refusals)
    if chosen == "native":
        return native.attend(query, keys, values, kv_heads=kv_heads, causal=causal, **arguments)[:2]
    if chosen == "fused":
        return fused.attend(query, keys, values, causal=causal, **_taken(arguments, FUSED)), None
    if causal:
        arguments["positions"], arguments["query_positions"] = causal_positions(query, keys)
    if chosen == "flash":
        return flash.attend(query, keys, values, **_taken(arguments, FLASH))
    output, lse = _implementation(chosen).attend(query, keys, values, **arguments)[:2]
    return output, lse


def attend_with_weights(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
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
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` for a single row, which also returns the softmax weights it used, so that no second pass computes them.

    Args:
        reduction: `"mean"`, `"sum"` or `"max"` over the query heads of a KV head.

    Returns:
        Output and log-sum-exp as `attend`, and the weights `[batch, kv_heads, entries]` in fp32 (fp64 for fp64 input),
        0 where a slot is not visible. Entries are the slots, padded to the longest head in the flat layout, or with
        `index` its `n` (a slot listed twice has a weight at each place).

    Raises:
        ValueError: as `attend`; more than one row; an unknown `reduction`.
    """
    if impl == "auto" and torch.compiler.is_compiling():
        return operators.attend_with_weights(
            query, keys, values, reduction, scaling, positions, query_positions, starts, lengths, index, softcap, sinks,
            keys_scale, values_scale,
        )  # fmt: skip
    kv_heads = _check(
        query, keys, values, positions, query_positions, starts, lengths, index, sinks, keys_scale, values_scale
    )
    if query.shape[2] != 1:
        raise ValueError(f"query must have a single row for its weights, got {query.shape[2]}")
    if reduction not in native.REDUCTIONS:
        raise ValueError(f"reduction must be one of {sorted(native.REDUCTIONS)}, got {reduction!r}")
    if impl == "auto" and announced("attention with weights", "native"):  # the path of every decoded token
        fast = native.refusal(query, keys, values, kv_heads, weights=True) is None
    else:
        fast = False
    chosen = (
        "native"
        if fast
        else choose(
            "attention with weights",
            impl,
            {
                "native": lambda: native.refusal(query, keys, values, kv_heads, weights=True),
                "triton": lambda: (
                    triton_support.refusal(query, keys, values) or triton_support.storage_refusal(keys, values)
                ),
                "reference": lambda: None,
            },
        )
    )
    arguments: dict[str, Any] = {"kv_heads": kv_heads} if chosen == "native" else {}
    output, lse, weights = _implementation(chosen).attend(
        query,
        keys,
        values,
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
        weights=reduction,
        **arguments,
    )
    return output, lse, weights


def _implementation(name: str) -> Any:
    """The module of an implementation; Triton's is imported when it is first needed, for it imports `triton`."""
    return {"native": native, "reference": reference}.get(name) or import_module(f"kvpress.kernels.attention.{name}")


def _flash_refusal(query: Tensor, keys: Tensor, values: Tensor, causal: bool, arguments: dict[str, Any]) -> str | None:
    taken = _taken(arguments, FLASH_REFUSAL)
    if causal:
        taken["positions"], taken["query_positions"] = causal_positions(query, keys)
    return flash.refusal(query, keys, values, **taken)


def _taken(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: arguments[name] for name in names}


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    index: Tensor | None,
    sinks: Tensor | None,
    keys_scale: Tensor | None,
    values_scale: Tensor | None,
) -> int:
    kv_heads = check_query_and_slots(query, keys, values, starts, lengths)
    slots = keys.shape[2] if starts is None else None
    batch, query_heads, rows, _ = query.shape
    check_slot_options(batch, kv_heads, rows, slots, positions, query_positions, lengths, index)
    check_scales(keys, values, keys_scale, values_scale)
    if sinks is not None and sinks.shape != (query_heads,):
        raise ValueError(f"sinks must be [query_heads] = ({query_heads},), got {tuple(sinks.shape)}")
    return kv_heads
