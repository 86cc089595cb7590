"""Attention of decoded tokens over slots that stay where they are: what is the same at every token is looked up once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.attention import native
from kvpress.kernels.attention.api import attend, attend_with_weights
from kvpress.kernels.native import tensors as fields

QUERY, RESULTS = 5, -5  # places of addresses among the fields of `Attention` in `kernels/native/arguments.hpp`


class SteadyAttention:
    """`attend` and `attend_with_weights` of a single row over slots whose memory, number and layout do not change.

    The first call of a kind goes the usual way, with all checks. Where the compiled kernels serve it, later calls of the same kind hand
    them the addresses that were found then.

    Args:
        keys, values: the slots, dense or flat, as `attend` takes them.
        layout: `starts` and `lengths` of flat slots, `keys_scale` and `values_scale` of int8 ones.
    """

    def __init__(self, keys: Tensor, values: Tensor, layout: dict[str, Tensor]) -> None:
        self.keys, self.values, self._layout = keys, values, dict[str, Any](layout)
        starts = layout.get("starts")
        self._kv_heads = keys.shape[1] if starts is None else starts.shape[1]
        self._kind: tuple[Any, ...] | None = None
        self._before: tuple[Any, ...] = ()  # fields of the kernel in front of the query's address,
        self._between: tuple[Any, ...] = ()  # between it and the addresses of the results,
        self._behind: tuple[Any, ...] = ()  # and behind them
        self._shapes: tuple[tuple[int, ...], tuple[int, ...] | None] = ((), None)
        self._owners: list[Tensor] = []

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float,
        positions: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        reduction: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Output `[batch, query_heads, 1, value_dim]`, and with `reduction` the weights of `attend_with_weights`.

        Args:
            query: `[batch, query_heads, 1, dim]`.
            positions: `[batch, kv_heads or 1, slots]`; a later call with the same address reads what is there then.
            scaling, softcap, sinks, reduction: as of `attend_with_weights`; without `reduction` no weights are made.

        Raises:
            ValueError: as `attend`.
        """
        kind = (
            query.shape,
            query.stride(),
            query.dtype,
            scaling,
            softcap,
            reduction,
            None if positions is None else (positions.data_ptr(), positions.shape),
            None if sinks is None else sinks.data_ptr(),
            torch.get_num_threads(),
        )
        if kind != self._kind or torch.compiler.is_compiling() or (query.requires_grad and torch.is_grad_enabled()):
            self._kind = None
            options: dict[str, Any] = {"scaling": scaling, "positions": positions, "softcap": softcap, "sinks": sinks}
            result = self._checked(query, reduction, options)
            if self._prepare(query, reduction, options):
                self._kind = kind
            return result
        shape, reduced = self._shapes
        output = torch.empty(shape, dtype=query.dtype)
        weights = None if reduced is None else torch.empty(reduced, dtype=torch.float32)
        fields.built().attention(
            *self._before,
            query.data_ptr(),
            *self._between,
            output.data_ptr(),
            0,
            0 if weights is None else weights.data_ptr(),
            *self._behind,
        )
        return output, weights

    def _checked(self, query: Tensor, reduction: str | None, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        if reduction is None:
            return attend(query, self.keys, self.values, **options, **self._layout)[0], None
        output, _, weights = attend_with_weights(
            query, self.keys, self.values, reduction=reduction, **options, **self._layout
        )
        return output, weights

    def _prepare(self, query: Tensor, reduction: str | None, options: dict[str, Any]) -> bool:
        """Note the fields of the call just made, if the compiled kernels served it from the tensors themselves."""
        keys, values, layout, kv_heads = self.keys, self.values, self._layout, self._kv_heads
        positions, sinks = options["positions"], options["sinks"]
        if native.refusal(query, keys, values, kv_heads, weights=reduction is not None) is not None:
            return False
        if positions is not None and fields.as_integers(positions) is not positions:
            return False  # a copy would not follow what is written there
        if sinks is not None and fields.as_floats(sinks) is not sinks:
            return False
        batch, heads, rows, _ = query.shape
        starts, lengths = layout.get("starts"), layout.get("lengths")
        entries = keys.shape[2] if lengths is None else int(lengths.max())
        found, self._owners = fields.attention_fields(
            query,
            keys,
            values,
            kv_heads=kv_heads,
            starts=starts,
            lengths=lengths,
            keys_scale=layout.get("keys_scale"),
            values_scale=layout.get("values_scale"),
            query_positions=None,
            index=None,
            causal=False,
            output=0,
            lse=0,
            weights=0,
            reduction=0 if reduction is None else native.REDUCTIONS[reduction],
            entries=entries if reduction is not None else 0,
            **options,
        )
        self._before, self._between, self._behind = found[:QUERY], found[QUERY + 1 : RESULTS], found[-2:]
        weights = None if reduction is None else (batch, kv_heads, entries)
        self._shapes = ((batch, heads, rows, values.shape[-1]), weights)
        return True
