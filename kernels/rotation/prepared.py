"""Rotation of one tensor after another by the same tables: what is the same for tensors of one kind is looked up once."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from kvpress.kernels.native import tensors as fields
from kvpress.kernels.rotation import native
from kvpress.kernels.rotation.api import rotate


class PreparedRotation:
    """`rotate` by tables that stay.

    Args:
        cosine, sine: `[batch or 1, 1, slots, rotary_dim]`.
        inverse: rotate the other way.
    """

    def __init__(self, cosine: Tensor, sine: Tensor, *, inverse: bool = False) -> None:
        self.cosine, self.sine, self.inverse = cosine, sine, inverse
        self._calls: dict[tuple[object, ...], array[int]] = {}  # by the kind of tensor
        self._places: dict[tuple[object, ...], array[int]] = {}  # likewise, of buffers whose rows are turned in place

    def rotate(self, slots: Tensor) -> Tensor:
        """As `kvpress.kernels.rotation.rotate`, with the same errors.

        Args:
            slots: `[batch, heads, slots, dim]`.
        """
        kind = (slots.shape, slots.stride(), slots.dtype)
        call = self._calls.get(kind)
        if call is None or torch.compiler.is_compiling() or (slots.requires_grad and torch.is_grad_enabled()):
            rotated = rotate(slots, self.cosine, self.sine, inverse=self.inverse)
            if self._served(slots):
                found = native.fields(slots, self.cosine, self.sine, None, self.inverse, rotated)
                self._calls[kind] = native.packed(found)
            return rotated
        output = torch.empty(slots.shape, dtype=slots.dtype)
        call[native.SOURCE], call[native.OUTPUT] = slots.data_ptr(), output.data_ptr()
        fields.built().rotate_again(call)
        return output

    def rotate_in_place(self, buffer: Tensor, slot: int) -> bool:
        """Rotate the rows in `slot` of `buffer [batch, heads, room, dim]` where they lie, by tables of a single slot.

        Returns:
            Whether it was done: the compiled kernel must be able to serve.
        """
        kind = (buffer.shape, buffer.stride(), buffer.dtype)
        call = self._places.get(kind)
        if call is None or torch.compiler.is_compiling():
            if self.cosine.shape[2] != 1 or torch.compiler.is_compiling() or not self._served(buffer):
                return False
            rows = buffer[:, :, :1]
            call = native.packed(native.fields(rows, self.cosine, self.sine, None, self.inverse, rows))
            self._places[kind] = call
        place = buffer.data_ptr() + slot * buffer.stride(2) * buffer.element_size()
        call[native.SOURCE] = call[native.OUTPUT] = place
        fields.built().rotate_again(call)
        return True

    def _served(self, slots: Tensor) -> bool:
        tables = self.cosine, self.sine
        return native.refusal(slots, *tables) is None and all(fields.as_floats(table) is table for table in tables)
