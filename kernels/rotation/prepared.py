"""Rotation of one tensor after another by the same tables: what is the same for tensors of one kind is looked up once."""

from __future__ import annotations

from array import array
from importlib import import_module

import torch
from torch import Tensor

from kvpress.kernels import triton_support
from kvpress.kernels.native import tensors as fields
from kvpress.kernels.rotation import native
from kvpress.kernels.rotation.api import rotate

Kind = tuple[
    torch.Size, tuple[int, ...], torch.dtype, bool
]  # shape, strides and type of what is rotated; whether it is where it lies


class PreparedRotation:
    """`rotate` by tables that stay.

    Args:
        cosine, sine: `[batch or 1, 1, slots, rotary_dim]`.
        inverse: rotate the other way.
        known: calls by the kind of tensor, of tables like these: what was looked up for them serves here.
    """

    def __init__(
        self, cosine: Tensor, sine: Tensor, *, inverse: bool = False, known: dict[Kind, array[int]] | None = None
    ) -> None:
        self.cosine, self.sine, self.inverse = cosine, sine, inverse
        self._known = (
            {} if known is None else known
        )  # only ever added to: several threads may rotate by tables like these
        self._calls: dict[Kind, array[int]] = {}  # likewise, with the addresses of these tables
        self._rows: dict[Kind, array[int]] = {}  # of single rows of tables
        self._launched: set[Kind] = set()  # kinds of tensors on a GPU that were checked, and can be launched for

    def row(self, row: int) -> PreparedRotation:
        """Rotates by row `row` of these tables alone."""
        part = slice(row, row + 1)
        cosine, sine = self.cosine[:, :, part], self.sine[:, :, part]
        return PreparedRotation(cosine, sine, inverse=self.inverse, known=self._rows)

    def rotate(self, slots: Tensor) -> Tensor:
        """As `kvpress.kernels.rotation.rotate`, with the same errors.

        Args:
            slots: `[batch, heads, slots, dim]`.
        """
        kind = (slots.shape, slots.stride(), slots.dtype, False)
        call, launched = self._call(kind), kind in self._launched and slots.is_cuda
        unknown = call is None and not launched
        if unknown or torch.compiler.is_compiling() or (slots.requires_grad and torch.is_grad_enabled()):
            rotated = rotate(slots, self.cosine, self.sine, inverse=self.inverse)
            self._learn(slots, rotated, kind)
            return rotated
        if call is None:
            launch = import_module("kvpress.kernels.rotation.triton")
            turned: Tensor = launch.rotate(slots, self.cosine, self.sine, inverse=self.inverse)
            return turned
        output = torch.empty(slots.shape, dtype=slots.dtype)
        call[native.THREADS] = torch.get_num_threads()
        call[native.SOURCE], call[native.OUTPUT] = slots.data_ptr(), output.data_ptr()
        fields.built().rotate_again(call)
        return output

    def rotate_in_place(self, buffer: Tensor, slot: int) -> bool:
        """Rotate the rows in `slot` of `buffer [batch, heads, room, dim]` where they lie, by tables of a single slot.

        Returns:
            Whether it was done: the compiled kernel must be able to serve.
        """
        kind = (buffer.shape, buffer.stride(), buffer.dtype, True)
        call = self._call(kind)
        if call is None or torch.compiler.is_compiling():
            if self.cosine.shape[2] != 1 or torch.compiler.is_compiling():
                return False
            call = self._learn(buffer[:, :, :1], buffer[:, :, :1], kind)
            if call is None:
                return False
        place = buffer.data_ptr() + slot * kind[1][2] * buffer.element_size()
        call[native.SOURCE] = call[native.OUTPUT] = place
        fields.built().rotate_again(call)
        return True

    def rotate_into(self, buffer: Tensor, slot: int, rows: Tensor) -> bool:
        """Rotate `rows [batch, heads, 1, dim]` on a GPU into `slot` of `buffer [batch, heads, room, dim]`, where they do not lie.

        Returns:
            Whether it was done: the Triton kernel must be able to serve.
        """
        tables = self.cosine, self.sine
        if torch.compiler.is_compiling() or buffer.stride(-1) != 1 or triton_support.refusal(rows, *tables):
            return False
        launch = import_module("kvpress.kernels.rotation.triton")
        launch.rotate_into(buffer[:, :, slot : slot + 1], rows, *tables, inverse=self.inverse)
        return True

    def _call(self, kind: Kind) -> array[int] | None:
        """The call of a kind that was looked up before, for these tables."""
        call = self._calls.get(kind)
        if call is None and (known := self._known.get(kind)) is not None:
            call = self._calls[kind] = known[:]
            call[native.COSINE], call[native.SINE] = self.cosine.data_ptr(), self.sine.data_ptr()
        return call

    def _learn(self, slots: Tensor, output: Tensor, kind: Kind) -> array[int] | None:
        """Note the call that makes `output` of `slots`, if the compiled kernel serves it from the tables themselves."""
        tables = self.cosine, self.sine
        if slots.is_cuda and triton_support.refusal(slots, *tables) is None:
            self._launched.add(kind)
        if native.refusal(slots, *tables) is not None:
            return None
        if not all(table.dtype == torch.float32 and table.stride(-1) == 1 for table in tables):
            return None
        call = native.packed(native.fields(slots, *tables, None, self.inverse, output))
        self._calls[kind], self._known[kind] = call, call[:]
        return call
