"""DecodeStep: a decoded token's way through a layer that keeps every token, by one call of the compiled kernels."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.columns import POSITION
from kvpress.errors import CacheStateError
from kvpress.forward import Forward, came_with
from kvpress.kernels.choosing.prepared import PreparedVote
from kvpress.kernels.decode_step import PreparedStep
from kvpress.observation import AttentionArguments
from kvpress.offload.step_copies import StepCopies
from kvpress.policies.selection import ALL
from kvpress.step_slots import StepSlots

if TYPE_CHECKING:
    from kvpress.layer import PolicyLayer


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What addresses and strides that were looked up for one tensor suppose of another."""
    return tensor.shape, tensor.stride(), tensor.dtype


class DecodeStep:
    """What the ordinary way of a decoded token (`PolicyLayer.update`, `place`, `attend`, `finish`) looked up and checked, used for later
    tokens of the same kind.

    Between `update` and attention it stands in for the `Forward`, and nothing of the cache has changed but that a token is on its way:
    one that is not as it supposes leaves for the ordinary way. The first layer always goes that way, and notes in the clock what it found
    of mask and positions; the others take that over where they are given the same tensors.

    It knows addresses, and holds none of the memory there: whether that is still what it was is the first that it asks.

    Args:
        layer: that a token just went through.
        query, keys, values: its own, as the attention function got them.
        arguments: likewise.
        step: its kernels.
        index: the slots that it attended to, `None` for all.
    """

    def __init__(
        self,
        layer: PolicyLayer,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        arguments: AttentionArguments,
        slots: StepSlots,
        step: PreparedStep,
        index: Tensor | None,
    ) -> None:
        table = layer.table
        self.layer = weakref.ref(layer)
        self._table, self._slots, self._step = table, slots, step
        self._keys_kind, self._values_kind, self._query_kind = _kind(keys), _kind(values), _kind(query)
        self._arguments = (arguments.scaling, arguments.softcap)
        self._sinks = arguments.sinks
        batch, heads, rows, _ = query.shape
        self._output = (batch, rows, heads, values.shape[-1])
        self._listed = None if index is None else _kind(index)
        self._index = index  # written over by the selections to come
        tables = None if layer.rotation is None or index is None else layer.rotation.tables(query, index.shape[-1])
        self._tables = [weakref.ref(table) for table in tables or ()]  # whose addresses the kernels know
        self._keys: Tensor | None = None  # of the token that is on its way
        self._values: Tensor | None = None
        positions = table.columns.stored(POSITION)  # of tokens in order they are known beforehand
        positions[:, :, table.count :] = torch.arange(table.count, positions.shape[2], dtype=positions.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Of a copied layer there is none yet: addresses are those of the original."""

    @classmethod
    def after(
        cls,
        layer: PolicyLayer,
        forward: Forward,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        arguments: AttentionArguments,
    ) -> DecodeStep | None:
        """For tokens like that of `forward`, which attention just served; `None` where such a token has to go the ordinary way."""
        table, reader, known = layer.table, layer.reader, layer.clock.decoded
        if (
            came_with(keys) is not forward
            or known is None
            or forward.visible is not None
            or not (layer.selector is None or layer.selector.tells_at_once)
            or known.tokens.newest != table.count - 1
            or table.dtype != keys.dtype
        ):
            return None
        index = None if reader is None else reader.listed
        slots = StepSlots.of(table) if table.stowage is None else StepCopies.of(table, index)
        if slots is None or (index is not None and not index.is_contiguous()):
            return None
        back = None
        if layer.rotation is not None:
            back = layer.rotation.way_back_by_kernel(query, forward.rotated)
            if back is None or index is None:
                return None
        step = slots.prepare(table, query, keys, values, back)
        return None if step is None else cls(layer, query, keys, values, arguments, slots, step, index)

    def tensors(self) -> list[Tensor]:
        """What is held beside the table's own tensors."""
        return [each for each in (self._index, self._step.plain, *self._slots.tensors()) if each is not None]

    @property
    def waits(self) -> bool:
        """Whether a token is on its way."""
        return self._keys is not None

    def take(self, layer: PolicyLayer, keys: Tensor, values: Tensor) -> bool:
        """Take in a token `[batch, kv_heads, 1, dim]`, if it is as those before it."""
        table = self._table
        if (
            layer.forward is not None
            or not layer.attended
            or table.has_empty
            or not self._slots.stay(table)
            or _kind(keys) != self._keys_kind
            or _kind(values) != self._values_kind
            or torch.compiler.is_compiling()
        ):
            layer.step = None
            return False
        self._keys, self._values = keys, values
        layer.seen += 1
        layer.forward = self
        return True

    def attend(
        self, query: Tensor, keys: Tensor, mask: Tensor | None, ids: Tensor | None, arguments: AttentionArguments
    ) -> Tensor | None:
        """Output `[batch, 1, query_heads, value_dim]`; or `None`, and nothing was done.

        Args:
            query, keys, mask, ids, arguments: as the attention function got them; `ids` are the position ids.
        """
        layer, values = self.layer(), self._values
        if layer is None or values is None:
            return None
        known, count = layer.clock.decoded, self._table.count
        if (
            known is None
            or known.mask is not mask
            or known.ids is not ids
            or known.tokens.newest != count
            or keys is not self._keys
            or _kind(query) != self._query_kind
            or (arguments.scaling, arguments.softcap) != self._arguments
            or arguments.sinks is not self._sinks
            or any(table() is None for table in self._tables)
            or (query.requires_grad and torch.is_grad_enabled())
            or torch.is_autocast_enabled("cpu")
        ):
            layer.step = None
            return None
        step, slots, selector, back, index, choice = self._step, self._slots, layer.selector, None, None, None
        if step.plain is not None:
            if layer.rotation is not None and known.rotated_to is not None:
                back = layer.rotation.way_back_by_kernel(query, known.rotated_to)
            if back is None:
                return None
        plain, vote, pages, places = query if step.plain is None else step.plain, None, None, None
        if selector is not None:
            choice = selector.at_once(plain, count + 1)
            if choice is None:
                return None
            if (choice is ALL) != (self._listed is None):
                layer.step = None  # the first token from which a few slots are chosen
                return None
            if isinstance(choice, Tensor):
                if _kind(choice) != self._listed:
                    return None
                index = choice
            elif choice is not ALL and self._index is not None:
                index = self._index
                call = choice.call_for(plain.data_ptr(), count + 1, index.data_ptr())
                vote, pages = (call, None) if isinstance(choice, PreparedVote) else (None, call)
        found = index
        if index is not None and (places := slots.places(self._table, index)) is not None:
            found = slots.found
        output, place = torch.empty(self._output, dtype=query.dtype), slots.place(self._table)
        anew, missing = step.run(query, keys, values, output, back, *place, found, vote, pages, places)
        if index is not None and missing:
            slots.bring(self._table, index)
            step.attend()
        if selector is not None and (vote is not None or pages is not None):
            selector.called(anew)
        self._keys = self._values = None
        layer.took_step(known.tokens, index)
        return output

    def leave(self) -> Forward:
        """The token that is on its way goes the ordinary way."""
        layer, keys, values = self.layer(), self._keys, self._values
        if layer is None or keys is None or values is None:
            raise CacheStateError("the attention of this token ended before")
        self._keys = self._values = layer.forward = None
        layer.seen -= 1
        layer.update(keys, values)
        return layer.running
