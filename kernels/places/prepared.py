"""Places of the slots that a decoded token attends to, of lists of one length among rows that stay: what is the same is looked up once."""

from __future__ import annotations

import weakref
from array import array

import torch
from torch import Tensor

from kvpress.kernels.places import native

TAIL, BASE, VACANT, INDEX = 4, 5, 6, 7  # places among the fields of `FindPlaces` in `arguments.hpp`


class PreparedPlaces:
    """`find_places` as a part of a decode step. It holds none of the memory that it is given: `of_memory` tells whether it is still there.

    Args:
        index: `[batch, lists, n]` int64, contiguous, like those that will come.
        place, holder, uses: as of `find_places`.

    Attributes:
        found: `[batch, lists, n]` int64, written by each call: where the slots lie.
    """

    def __init__(self, index: Tensor, place: Tensor, holder: Tensor, uses: Tensor) -> None:
        self.found = torch.empty_like(index)
        self._missing = torch.empty(1 + index.numel(), dtype=torch.int64)
        self._place = weakref.ref(place)
        self._fields = array("q", native.fields(index, place, holder, uses, 0, 0, 0, self.found, self._missing))

    @staticmethod
    def refusal(index: Tensor, place: Tensor, holder: Tensor, uses: Tensor) -> str | None:
        """Why the compiled kernel cannot serve, or `None`."""
        return native.refusal(index, place, holder, uses)

    def of_memory(self, place: Tensor) -> bool:
        """Whether `place` is the one that was given."""
        return self._place() is place

    def call_for(self, index: int, tail: int, base: int, vacant: int) -> array[int]:
        """The fields of a call for the list at the address `index`; `tail`, `base` and `vacant` as of `find_places`."""
        call = self._fields
        call[INDEX], call[TAIL], call[BASE], call[VACANT] = index, tail, base, vacant
        return call

    @property
    def missing(self) -> Tensor:
        """The flat entries whose slots lay nowhere at the last call."""
        return self._missing[1 : 1 + int(self._missing[0])]

    def tensors(self) -> list[Tensor]:
        """Every tensor held, but for those given."""
        return [self.found, self._missing]
