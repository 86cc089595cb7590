"""Attention of a single row on GPUs, call after call over the same slots: launches whose constant arguments are looked up once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.attention import triton_kernels
from kvpress.kernels.attention.triton import (
    WEIGHTS_BLOCK,
    constant_arguments,
    merge_arguments,
    weights_arguments,
)
from kvpress.kernels.rotation.triton import rotate
from kvpress.kernels.triton_launch import PreparedLaunch
from kvpress.kernels.triton_support import on_device, plan_splits, power_of_two


class PreparedRow:
    """`kvpress.kernels.attention.triton.attend` of a single row for queries of one kind, without the log-sum-exp.

    Args:
        query: one of the queries, `[batch, query_heads, 1, dim]`.
        keys, values, layout: the slots, as `kvpress.kernels.attention.prepared.PreparedAttention` has them.
        positions, index, sinks, rotation, scaling, softcap: as `PreparedAttention.attend` takes them; a later call has other tensors of
            the same kind, and the same `positions` and `sinks`.
        weights: the reduction of the weights, or `None`.
    """

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: dict[str, Tensor],
        *,
        positions: Tensor | None,
        index: Tensor | None,
        sinks: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        scaling: float,
        softcap: float | None,
        weights: str | None,
    ) -> None:
        starts, lengths = layout.get("starts"), layout.get("lengths")
        if rotation is not None:
            query = turned_row(query, rotation, 1)
        self._constant = constant_arguments(
            query, keys, values, scaling=scaling, positions=positions, query_positions=None, starts=starts,
            lengths=lengths, index=index, softcap=softcap, keys_scale=layout.get("keys_scale"),
            values_scale=layout.get("values_scale"), rotary=0 if rotation is None else rotation[0].shape[-1], by_entry=True,
        )  # fmt: skip
        self._sinks, self._weights, self._dense = sinks, weights, starts is None
        batch, query_heads = query.shape[:2]
        kv_heads, group = self._constant["KV_HEADS"], self._constant["GROUP"]
        self._blocks, self._pairs = -(-group // self._constant["BLOCK_M"]), batch * kv_heads
        self._rows, self._shape = batch * query_heads, (batch, query_heads, 1, values.shape[-1])
        self._heads = (batch, query_heads, kv_heads)
        self._held = keys.shape[0] // max(1, self._pairs)
        self._longest = 0 if lengths is None else int(lengths.max())
        self._ends = None if lengths is None or index is not None else lengths.contiguous()
        self._launches: dict[object, PreparedLaunch] = {}

    def __call__(
        self, query: Tensor, slots: int, index: Tensor | None, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and the weights that were asked for."""
        entries, longest = slots, slots
        if index is not None:
            entries = longest = index.shape[-1]
        elif not self._dense:
            entries, longest = self._longest, self._held
        parts = plan_splits(query, self._blocks * self._pairs, longest)
        batch, query_heads, kv_heads = self._heads
        single: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
        output, lse = (
            torch.empty(self._shape, dtype=query.dtype, device=query.device),
            torch.empty(self._rows, **single),
        )
        scores = weights = None
        if self._weights is not None:
            scores = torch.empty(batch, query_heads, entries, **single)
            weights = torch.empty(batch, kv_heads, entries, **single)
        part_output, part_lse = output, lse
        if parts > 1:
            part_output = torch.empty(parts, self._rows, self._shape[-1], **single)
            part_lse = torch.empty(parts, self._rows, **single)
        cosine = sine = None
        if rotation is not None:
            cosine, sine = rotation
            query = turned_row(query, rotation, entries)
        with on_device(query):
            self._launch("attend", parts > 1)(
                (self._blocks, self._pairs, parts),
                query=query, index=index, cosine=cosine, sine=sine, output=part_output, lse=part_lse, scores_out=scores,
                entries=entries, splits=parts,
            )  # fmt: skip
            if parts > 1:
                self._launch("merge", power_of_two(parts))(
                    (self._rows, 1, 1),
                    partial_output=part_output, partial_lse=part_lse, output=output, lse=lse, splits=parts,
                )  # fmt: skip
            if weights is not None and entries:
                self._launch("weights", None)(
                    (-(-entries // WEIGHTS_BLOCK), self._pairs, 1),
                    scores=scores, lse=lse, output=weights, entries=entries,
                )  # fmt: skip
        return output, weights

    def _launch(self, stage: str, kind: Any) -> PreparedLaunch:
        """The launch of a stage; `kind` is whether parts are merged later, or to how many their number is rounded up."""
        found = self._launches.get((stage, kind))
        if found is None:
            if stage == "attend":
                arguments = self._constant | {"SPLIT": kind, "sinks": None if kind else self._sinks}
                found = PreparedLaunch(triton_kernels.attend_kernel, arguments)
            elif stage == "merge":
                arguments = merge_arguments(self._constant, self._rows, self._sinks, kind)
                found = PreparedLaunch(triton_kernels.merge_kernel, arguments)
            else:
                arguments = weights_arguments(self._constant, self._ends, self._weights)
                found = PreparedLaunch(triton_kernels.weights_kernel, arguments)
            self._launches[stage, kind] = found
        return found


def turned_row(query: Tensor, rotation: tuple[Tensor, Tensor], entries: int) -> Tensor:
    """The row turned to the last of `entries` places."""
    last = slice(max(entries - 1, 0), max(entries, 1))
    return rotate(query, *(table[None, None, last] for table in rotation))
