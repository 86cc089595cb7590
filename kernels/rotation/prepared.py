"""Rotation of one tensor after another by the same tables: what is the same for tensors of one kind is looked up once."""

from __future__ import annotations

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
        self._fields: dict[tuple[object, ...], tuple[tuple[float, ...], tuple[float, ...]]] = {}  # around the address

    def rotate(self, slots: Tensor) -> Tensor:
        """As `kvpress.kernels.rotation.rotate`, with the same errors.

        Args:
            slots: `[batch, heads, slots, dim]`.
        """
        kind = (slots.shape, slots.stride(), slots.dtype)
        known = self._fields.get(kind)
        if known is None or torch.compiler.is_compiling() or (slots.requires_grad and torch.is_grad_enabled()):
            rotated = rotate(slots, self.cosine, self.sine, inverse=self.inverse)
            tables = self.cosine, self.sine
            if native.refusal(slots, *tables) is None and all(fields.as_floats(table) is table for table in tables):
                self._fields[kind] = native.fields(slots, *tables, None, self.inverse)
            return rotated
        output = torch.empty(slots.shape, dtype=slots.dtype)
        fields.built().rotate(torch.get_num_threads(), *known[0], slots.data_ptr(), *known[1], output.data_ptr())
        return output
