"""Eviction of one slot a head from slots that stay where they are: what is the same at every token is looked up once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.kernels import triton_support
from kvpress.kernels.eviction import native
from kvpress.kernels.eviction.api import weakest
from kvpress.kernels.native import tensors as fields

if TYPE_CHECKING:
    from kvpress.kernels.eviction.triton import PreparedWeakest


class SteadyWeakest:
    """`weakest` of slots whose memory, number and layout do not change.

    The first call of a kind goes the usual way, with all checks. Where the compiled kernel serves it, later calls of the same kind hand it
    the addresses that were found then.

    Args:
        positions: `[batch, kv_heads, slots]`; every call reads what is there then.
        lengths: `[batch, kv_heads]`, of ragged heads.
    """

    def __init__(self, positions: Tensor, lengths: Tensor | None) -> None:
        self.positions, self.lengths = positions, lengths
        self._kind: tuple[Any, ...] | None = None
        self._before: tuple[int, ...] = ()  # fields of the kernel in front of the scores' address,
        self._behind: tuple[int, ...] = ()  # and behind it, the protected positions and the result aside
        self._owners: list[Tensor] = []
        self._launch: PreparedWeakest | None = None  # on a GPU, in place of the fields

    def find(self, scores: Tensor, sinks: int | Tensor, first_recent: int | Tensor) -> Tensor:
        """As `weakest`: `[batch, kv_heads]` int64.

        Args:
            scores: `[batch, kv_heads or 1, slots]` fp32.
            sinks, first_recent: as of `weakest`.

        Raises:
            ValueError: as `weakest`.
        """
        alike = isinstance(sinks, int) and isinstance(first_recent, int)  # limits by head are looked up at every call
        kind = (scores.shape, scores.stride(), scores.dtype, scores.data_ptr() % triton_support.ALIGNED)
        if not alike or kind != self._kind or torch.compiler.is_compiling():
            if alike:
                self._kind = kind if self._prepare(scores) else None
            return weakest(scores, self.positions, sinks=sinks, first_recent=first_recent, lengths=self.lengths)
        if self._launch is not None:
            return self._launch.find(scores, sinks, first_recent)
        slot = torch.empty(self._before[:2], dtype=torch.int64)
        fields.built().weakest(*self._before, scores.data_ptr(), *self._behind, sinks, first_recent, slot.data_ptr())
        return slot

    def _prepare(self, scores: Tensor) -> bool:
        positions = self.positions
        self._launch = None
        if triton_support.refusal(scores, positions) is None:
            module = import_module("kvpress.kernels.eviction.triton")
            self._launch = module.PreparedWeakest(scores, positions, 0, 0, self.lengths)
            return True
        if native.refusal(scores, positions) is not None or scores.stride()[-1] != 1:
            return False
        if fields.as_integers(positions) is not positions:
            return False  # a copy would not follow what is written there
        batch, kv_heads, slots = positions.shape
        lengths = 0
        if self.lengths is not None:
            self._owners = [fields.as_int64(self.lengths).contiguous()]
            lengths = self._owners[0].data_ptr()
        self._before = (batch, kv_heads, slots)
        self._behind = (
            *fields.batch_and_head_strides(scores, batch, kv_heads),
            positions.data_ptr(),
            positions.element_size(),
            *fields.batch_and_head_strides(positions, batch, kv_heads),
            lengths,
            0,
            0,
        )
        return True
