"""One call of the compiled kernels for all that a decoded token does in a layer: what each part's own prepared call knows, side by side."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.kernels.native import tensors as fields
from kvpress.kernels.rotation import native as rotation

if TYPE_CHECKING:
    from kvpress.kernels.attention.prepared import PreparedAttention
    from kvpress.kernels.decode_step.eviction import PreparedEviction
    from kvpress.kernels.rotation.prepared import PreparedRotation

# places among the fields of `DecodedToken` in `arguments.hpp`
THREADS, SLOT, SLOTS, FOUND, STORED, POSITIONS, ROW, KEY, VALUE, QUERY, COSINE, SINE, INDEX, OUTPUT = range(14)


class PreparedStep:
    """Writes a key and a value where they belong, chooses slots, looks where they lie, attends to them, and evicts one.

    Args:
        query: `[batch, query_heads, 1, dim]`, as the model rotated it.
        keys, values: `[batch, kv_heads, 1, dim]`, likewise, or as they are stored.
        buffers: `[batch, kv_heads, room, dim]` of keys and of values, written to; or flat, with an `eviction` from ragged heads.
        attention: has just served such a query, over these buffers or others.
        back: where keys are stored before rotation: what undid that of such a token.
        stored: keys and values will come as they are stored.
        eviction: where a token takes the place of another: what comes after attention. Nothing is chosen then, and `back` is `None`.

    Attributes:
        plain: `[batch, query_heads, 1, dim]`, where there is `back`: the query before rotation, once it has been undone.

    Raises:
        ValueError: tensors that the compiled kernels do not serve, or that are stored in another type.
    """

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        buffers: tuple[Tensor, Tensor],
        attention: PreparedAttention,
        back: PreparedRotation | None,
        stored: bool = False,
        eviction: PreparedEviction | None = None,
    ) -> None:
        reason = self.refusal(query, keys, values, buffers, attention)
        if reason is not None:
            raise ValueError(f"a step cannot be prepared: {reason}")
        self._attention = attention.last_call()
        self._rows = array("q")
        for row, buffer in zip((keys, values), buffers, strict=True):
            self._rows.extend(_overwrite(row, buffer, eviction))
        self._eviction = None if eviction is None else eviction.call
        self._token = array("q", [0] * (OUTPUT + 1))
        self._token[STORED] = stored
        self._back: array[int] | None = None
        self.plain: Tensor | None = None
        if back is not None:
            self.plain = torch.empty(query.shape, dtype=query.dtype)
            key = query[:, : keys.shape[1]] if stored else keys  # not turned then
            turned = ((key, key if stored else buffers[0][:, :, :1]), (query, self.plain))
            self._back = array("q")
            for row, to in turned:
                self._back.extend(rotation.packed(rotation.fields(row, back.cosine, back.sine, None, True, to)))

    @staticmethod
    def refusal(
        query: Tensor, keys: Tensor, values: Tensor, buffers: tuple[Tensor, Tensor], attention: PreparedAttention
    ) -> str | None:
        """Why there can be no such step, or `None`."""
        if attention.last_call() is None:
            return "the compiled kernel did not serve attention"
        tensors = (query, keys, values, *buffers)
        if any(row.dtype != buffer.dtype for row, buffer in zip((keys, values), buffers, strict=True)):
            return f"rows must be of the type of their buffers, got {[tensor.dtype for tensor in tensors[1:]]}"
        if any(tensor.stride()[-1] != 1 for tensor in tensors):
            return "the last dimension must be contiguous"
        return None

    def run(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        back: PreparedRotation | None,
        slot: int,
        slots: int,
        positions: Tensor,
        index: Tensor | None = None,
        vote: array[int] | None = None,
        pages: array[int] | None = None,
        places: array[int] | None = None,
    ) -> tuple[bool, bool]:
        """Take a token in, and attend.

        Args:
            query, keys, values: `[batch, heads, 1, dim]`, of the strides of those that this was made for.
            output: `[batch, query_heads, 1, value_dim]`, contiguous, written to.
            back: where there was one; with tables of a single row.
            slot: where its key and value go, if it takes no other's place.
            slots: of those that attention reads how many are in use then; 0: as many as at the call that this was made after.
            positions: `[batch or 1, 1]` int32, of each row's token; of use where there is an eviction.
            index: `[batch, kv_heads or 1, n]`, which of them; as many as at that call.
            vote, pages, places: calls that come first, of `PreparedVote`, `PreparedPages` and `PreparedPlaces`; the last of them writes
                `index`.

        Returns:
            Whether a vote chose anew; and whether some of what was chosen lies nowhere. Nothing was attended to then: `attend` does that
            once all of it lies where `index` says.
        """
        token = self._token
        token[THREADS], token[SLOT], token[SLOTS], token[FOUND] = torch.get_num_threads(), slot, slots, 0
        token[KEY], token[VALUE], token[QUERY] = keys.data_ptr(), values.data_ptr(), query.data_ptr()
        token[POSITIONS], token[ROW], token[OUTPUT] = positions.data_ptr(), positions.shape[0] > 1, output.data_ptr()
        if back is not None:
            token[COSINE], token[SINE] = back.cosine.data_ptr(), back.sine.data_ptr()
        if index is not None:
            token[INDEX] = index.data_ptr()
        call: tuple[bool, bool] = fields.built().decode_step(
            token, self._rows, self._back, vote, pages, places, self._attention, self._eviction
        )
        return call

    def attend(self) -> None:
        """The end of a `run` that found some slots nowhere."""
        self._token[FOUND] = 1
        fields.built().decode_step(self._token, self._rows, self._back, None, None, None, self._attention, None)


def _overwrite(row: Tensor, buffer: Tensor, eviction: PreparedEviction | None) -> tuple[int, ...]:
    """The fields of `Overwrite` of rows like `row [batch, heads, 1, dim]` into `buffer [batch, heads, room, dim]`, or flat; which, and
    without an `eviction` where, is put in at each call."""
    starts = None if eviction is None else eviction.starts
    slot = 0 if eviction is None else eviction.spare.data_ptr()
    (batch, heads), (room, dim), item = row.shape[:2], buffer.shape[-2:], buffer.element_size()
    strides = buffer.stride()[:3] if starts is None else (0, 0, buffer.stride(0))
    to = (buffer.data_ptr(), *(stride * item for stride in strides), 0 if starts is None else starts.data_ptr(), slot)
    return (batch, heads, room, dim * item, *to, 0, *(stride * item for stride in row.stride()[:2]), 0)
