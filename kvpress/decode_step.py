"""DecodeStep: a decoded token's way through a layer by one call of the compiled kernels."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvpress.errors import CacheStateError
from kvpress.forward import Forward, came_with
from kvpress.kernels.choosing.prepared import PreparedVote
from kvpress.kernels.decode_step import PreparedStep
from kvpress.offload.step_copies import StepCopies
from kvpress.policies.selection import ALL
from kvpress.steady_slots import SteadySlots
from kvpress.step_slots import StepSlots

if TYPE_CHECKING:
    from kvpress.kernels.pages.prepared import PreparedPages
    from kvpress.kernels.rotation.prepared import PreparedRotation
    from kvpress.layer import PolicyLayer


class AttentionCall(NamedTuple):
    """What the attention function was given.

    Attributes:
        query: `[batch, query_heads, rows, dim]`.
        keys, values: `[batch, kv_heads, rows, dim]`.
        options: all else, `softcap`, `s_aux` and `position_ids` among them.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float | None
    options: dict[str, Any]


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
        call: of attention to it.
        slots: where it went.
        step: its kernels.
        index: the slots that it attended to, `None` for all.
    """

    def __init__(
        self,
        layer: PolicyLayer,
        call: AttentionCall,
        slots: StepSlots,
        step: PreparedStep,
        index: Tensor | None,
    ) -> None:
        table = layer.table
        query, keys, values, scaling, options = call
        self.layer = weakref.ref(layer)
        self._table, self._slots, self._step = table, slots, step
        self._keys_kind, self._values_kind, self._query_kind = _kind(keys), _kind(values), _kind(query)
        self._scaling, self._softcap, self._sinks = scaling, options.get("softcap"), options.get("s_aux")
        batch, heads, rows, _ = query.shape
        self._output = (batch, rows, heads, values.shape[-1])
        self._listed = None if index is None else _kind(index)
        self._index = index  # written over by the selections to come
        tables = None if layer.rotation is None or index is None else layer.rotation.tables(query, index.shape[-1])
        self._cosines = None if tables is None else weakref.ref(tables[0])  # whose address the kernels know
        self._keys: Tensor | None = None  # of the token that is on its way
        self._values: Tensor | None = None
        slots.foresee(table)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Of a copied layer there is none yet: addresses are those of the original."""

    @classmethod
    def after(cls, layer: PolicyLayer, forward: Forward, call: AttentionCall) -> DecodeStep | None:
        """For tokens like that of `forward`, which `call` just attended to; `None` where such a token has to go the ordinary way."""
        table, reader, known = layer.table, layer.reader, layer.clock.decoded
        if (
            came_with(call.keys) is not forward
            or known is None
            or forward.visible is not None
            or not (layer.selector is None or layer.selector.tells_at_once)
            or known.tokens.seen != layer.seen_rows
            or table.dtype != call.keys.dtype
        ):
            return None
        index = None if reader is None else reader.listed
        slots = cls._slots_of(layer, index)
        if slots is None or (index is not None and not index.is_contiguous()):
            return None
        back = None
        if layer.rotation is not None:
            back = layer.rotation.way_back_by_kernel(call.query, forward.rotated)
            if back is None or index is None:
                return None
        step = slots.prepare(table, call.query, call.keys, call.values, back)
        return None if step is None else cls(layer, call, slots, step, index)

    @staticmethod
    def _slots_of(layer: PolicyLayer, index: Tensor | None) -> StepSlots | None:
        table = layer.table
        if layer.policy.budget is not None:
            return SteadySlots.after(layer.keeper, layer.token_rule)
        return StepSlots.of(table) if table.stowage is None else StepCopies.within(table, index)

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
        self, query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float | None, options: dict[str, Any]
    ) -> Tensor | None:
        """Output `[batch, 1, query_heads, value_dim]`; or `None`, and nothing was done. Arguments are those of the attention function."""
        layer, table, values = self.layer(), self._table, self._values
        if layer is None or values is None:
            return None
        known, step = layer.clock.decoded, self._step
        if (
            known is None
            or known.mask is not mask
            or known.ids is not options.get("position_ids")
            or known.before != layer.seen_rows
            or keys is not self._keys
            or scaling != self._scaling
            or not self._asks_alike(query, options)
        ):
            layer.step = None
            return None
        back, plain = None, query
        if step.plain is not None:
            back, plain = self._way_back(layer, query, known.rotated_to), step.plain
            if back is None:
                return None
        index, choice, selector = None, None, layer.selector
        if selector is not None:
            chosen = selector.at_once(plain, table.count + 1)
            if chosen is None:
                return None
            if (chosen is ALL) != (self._index is None):
                layer.step = None  # the first token from which a few slots are chosen
                return None
            if isinstance(chosen, Tensor):
                index = chosen
                if _kind(index) != self._listed:
                    return None
            elif chosen is not ALL:
                index, choice = self._index, chosen
        output = torch.empty(self._output, dtype=query.dtype)
        anew = self._run(query, keys, values, output, known.tokens.positions, back, index, choice)
        if selector is not None and choice is not None:
            selector.called(anew)
        self._keys = self._values = None
        self._slots.advance(table)
        layer.took_step(known.tokens, index)
        return output

    def _asks_alike(self, query: Tensor, options: dict[str, Any]) -> bool:
        """Whether the addresses and numbers that were noted serve this query."""
        return (
            _kind(query) == self._query_kind
            and options.get("softcap") == self._softcap
            and options.get("s_aux") is self._sinks
            and (self._cosines is None or self._cosines() is not None)
            and not (query.requires_grad and torch.is_grad_enabled())
            and not torch.is_autocast_enabled("cpu")
        )

    def _way_back(self, layer: PolicyLayer, query: Tensor, positions: Tensor | None) -> PreparedRotation | None:
        return (
            None if layer.rotation is None or positions is None else layer.rotation.way_back_by_kernel(query, positions)
        )

    def _run(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        positions: Tensor,
        back: PreparedRotation | None,
        index: Tensor | None,
        choice: PreparedVote | PreparedPages | None,
    ) -> bool:
        """Everything that kernels do; whether a vote chose anew."""
        table, slots, step, vote, pages, places, found = self._table, self._slots, self._step, None, None, None, index
        if index is not None:
            if choice is not None:
                asking = query if step.plain is None else step.plain
                call = choice.call_for(asking.data_ptr(), table.count + 1, index.data_ptr())
                vote, pages = (call, None) if isinstance(choice, PreparedVote) else (None, call)
            places = slots.places(table, index)
            found = index if places is None else slots.found
        if table.packed:
            keys, values = table.form.pack(keys if back is None else back.rotate(keys)), table.form.pack(values)
        anew, missing = step.run(
            query, keys, values, output, back, *slots.place(table), positions, found, vote, pages, places
        )
        if missing and index is not None:
            slots.bring(table, index)
            step.attend()
        return anew

    def leave(self) -> Forward:
        """The token that is on its way goes the ordinary way."""
        layer, keys, values = self.layer(), self._keys, self._values
        if layer is None or keys is None or values is None:
            raise CacheStateError("the attention of this token ended before")
        self._keys = self._values = layer.forward = None
        layer.seen -= 1
        layer.update(keys, values)
        return layer.running
