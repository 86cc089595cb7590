"""One call of the compiled kernels for all that a decoded token does in a layer: what each part's own prepared call knows, side by side."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.kernels.choosing.prepared import PreparedVote
from kvpress.kernels.native import tensors as fields
from kvpress.kernels.rotation import native as rotation

if TYPE_CHECKING:
    from kvpress.kernels.pages.prepared import PreparedPages
    from kvpress.kernels.rotation.prepared import PreparedRotation

# places among the fields of `DecodedToken` in `arguments.hpp`
THREADS, SLOT, KEY, VALUE, QUERY, COSINE, SINE, INDEX, OUTPUT = range(9)


class PreparedStep:
    """Writes a key and a value into their slot, chooses slots and attends to them.

    Args:
        rows: fields of `RowWriter`'s call that wrote such a key and value.
        attention: fields of `PreparedAttention`'s call that served such a query.
        query: `[batch, query_heads, 1, dim]`, as the model rotated it.
        keys: `[batch, kv_heads, 1, dim]`, likewise.
        buffer: `[batch, kv_heads, room, dim]`: where keys are written to.
        back: where keys are stored before rotation: what undid that of the last token.

    Attributes:
        plain: `[batch, query_heads, 1, dim]`, where there is `back`: the query before rotation, once it has been undone.
    """

    def __init__(
        self,
        rows: array[int],
        attention: array[int],
        query: Tensor,
        keys: Tensor,
        buffer: Tensor,
        back: PreparedRotation | None,
    ) -> None:
        self._rows, self._attention = rows, attention
        self._token = array("q", [0] * (OUTPUT + 1))
        self._back: array[int] | None = None
        self.plain: Tensor | None = None
        if back is not None:
            self.plain = torch.empty(query.shape, dtype=query.dtype)
            found = [
                rotation.packed(rotation.fields(row, back.cosine, back.sine, None, True, output))
                for row, output in ((keys, buffer[:, :, :1]), (query, self.plain))
            ]
            self._back = found[0] + found[1]

    def run(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        slot: int,
        output: Tensor,
        back: PreparedRotation | None,
        index: Tensor | None = None,
        choice: PreparedVote | PreparedPages | None = None,
    ) -> bool:
        """Take a token into `slot`, and attend.

        Args:
            query, keys, values: `[batch, heads, 1, dim]`, of the strides that those had for which this was made.
            output: `[batch, query_heads, 1, value_dim]`, contiguous, written to.
            back: where there was one; with tables of a single row.
            index: `[batch, kv_heads or 1, n]` slots, where attention has listed as many.
            choice: writes `index` first.

        Returns:
            Whether the list was made by a new vote.
        """
        token = self._token
        token[THREADS], token[SLOT] = torch.get_num_threads(), slot
        token[KEY], token[VALUE], token[QUERY] = keys.data_ptr(), values.data_ptr(), query.data_ptr()
        token[OUTPUT] = output.data_ptr()
        if back is not None:
            token[COSINE], token[SINE] = back.cosine.data_ptr(), back.sine.data_ptr()
        vote = pages = None
        if index is not None:
            token[INDEX] = index.data_ptr()
            if choice is not None:
                asking = query if self.plain is None else self.plain
                call = choice.call_for(asking.data_ptr(), slot + 1, token[INDEX])
                vote, pages = (call, None) if type(choice) is PreparedVote else (None, call)
        anew: bool = fields.built().decode_step(token, self._rows, self._back, vote, pages, self._attention)
        return anew
