"""Slot rows: the keys and values of one slot side by side, with a checksum of their own, so that single slots can be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import xxhash
from torch import Tensor

from kvpress.offload.key import BlockKey
from kvpress.offload.layout import memory_of

NAME = "slot"  # of the one tensor of a block of slot rows
CHECKSUM_BYTES = 8
ALIGNMENT = 8  # bytes at which keys, values and checksum begin


@dataclass(frozen=True)
class RowPart:
    """One of the tensors in a row: its name, type, numbers per head, and the bytes it takes."""

    name: str
    dtype: torch.dtype
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class RowLayout:
    """A block of rows `[batch, groups, slots, width]` of uint8.

    Attributes:
        groups: rows of one slot and batch row: 1 where all KV heads lie together, else the KV heads, each apart.
        heads: KV heads in a row.
        slots: of the block.
        parts: what lies in a row, in order; the checksum is behind it.
    """

    groups: int
    heads: int
    slots: int
    parts: tuple[RowPart, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], slots: int, *, together: bool) -> RowLayout:
        """For tensors `[batch, kv_heads, any slots, dim]`, all heads of a slot `together` or each apart."""
        kv_heads = next(iter(tensors.values())).shape[1]
        groups, heads = (1, kv_heads) if together else (kv_heads, 1)
        parts, start = [], 0
        for name, tensor in tensors.items():
            stop = start + heads * tensor.shape[-1] * tensor.element_size()
            parts.append(RowPart(name, tensor.dtype, tensor.shape[-1], start, stop))
            start = -(-stop // ALIGNMENT) * ALIGNMENT
        return cls(groups, heads, slots, tuple(parts))

    @property
    def payload(self) -> int:
        """Bytes of a row before its checksum."""
        return -(-self.parts[-1].stop // ALIGNMENT) * ALIGNMENT

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return self.payload + CHECKSUM_BYTES

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """Of the rows of a block."""
        return batch, self.groups, self.slots, self.width

    def nbytes(self, batch: int) -> int:
        """Of a block."""
        return prod(self.shape(batch))

    def number(self, batch: int, group: int, slot: int) -> int:
        """Of a row in its block."""
        return (batch * self.groups + group) * self.slots + slot

    def pack(self, tensors: Mapping[str, Tensor], rows: Tensor, key: BlockKey) -> None:
        """Write `tensors [batch, kv_heads, slots, dim]` as the rows of the block `key`."""
        rows.zero_()
        for part in self.parts:
            target = rows[..., part.start : part.stop].view(part.dtype)
            source = tensors[part.name]
            if self.groups == 1:
                target.unflatten(-1, (self.heads, part.dim)).copy_(source.transpose(1, 2)[:, None])
            else:
                target.copy_(source)
        flat, width, payload = memory_of(rows), self.width, self.payload
        seed = seed_of(key)
        for number in range(len(flat) // width):
            start = number * width
            flat[start + payload : start + width] = checksum(flat[start : start + payload], seed ^ number)

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """Views `[batch, kv_heads, n, dim]` of rows `[batch, groups, n, width]`, or of their payloads."""
        found = {}
        for part in self.parts:
            tensor = rows[..., part.start : part.stop].view(part.dtype)
            if self.groups == 1:
                tensor = tensor[:, 0].unflatten(-1, (self.heads, part.dim)).transpose(1, 2)
            found[part.name] = tensor
        return found

    def first_damaged(
        self, rows: memoryview, numbers: Sequence[int], places: Iterable[int], key: BlockKey
    ) -> int | None:
        """The first of the rows `numbers` of the block `key` that is not what was written, if one is not; they lie at `places`."""
        width, payload, seed = self.width, self.payload, seed_of(key)
        for number, place in zip(numbers, places, strict=True):
            start = place * width
            end = start + payload
            if checksum(rows[start:end], seed ^ number) != rows[end : start + width]:
                return number
        return None


class RowsWanted:
    """Rows of several blocks, one block after the other. Tensors are contiguous and of int64.

    Args:
        blocks: which blocks of their source.
        firsts: `[blocks + 1]`: those of `blocks[i]` are `numbers[firsts[i] : firsts[i + 1]]`.
        numbers: of the rows in their blocks.
        places: where they go, as rows of the output.
    """

    def __init__(self, blocks: Tensor, firsts: Tensor, numbers: Tensor, places: Tensor) -> None:
        self.blocks, self.firsts, self.numbers, self.places = blocks, firsts, numbers, places

    @classmethod
    def of(cls, numbers: Sequence[Sequence[int]]) -> RowsWanted:
        """From a list of numbers for each block of the source, to places in order."""
        firsts = torch.tensor([0, *map(len, numbers)]).cumsum(0)
        listed = torch.tensor([number for some in numbers for number in some], dtype=torch.int64)
        return cls(torch.arange(len(numbers)), firsts, listed, torch.arange(len(listed)))

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.numbers)

    def some(self, which: Sequence[int]) -> RowsWanted:
        """Those of `blocks[each]` for each of `which`."""
        begins, ends = self.firsts[:-1].tolist(), self.firsts[1:].tolist()
        firsts = torch.tensor([0, *(ends[each] - begins[each] for each in which)]).cumsum(0)
        rows = torch.cat([torch.arange(begins[each], ends[each]) for each in which])
        return RowsWanted(self.blocks[list(which)], firsts, self.numbers[rows], self.places[rows])

    def of_block(self, each: int) -> tuple[Tensor, Tensor]:
        """Numbers and places of the rows of `blocks[each]`."""
        first, last = self.firsts[each : each + 2].tolist()
        return self.numbers[first:last], self.places[first:last]


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending stretches of `numbers` as (first, how many), in their order."""
    found: list[tuple[int, int]] = []
    start, count = -1, 0
    for number in numbers:
        if number == start + count:
            count += 1
            continue
        if count:
            found.append((start, count))
        start, count = number, 1
    if count:
        found.append((start, count))
    return found


def checksum(payload: memoryview, seed: int) -> bytes:
    """XXH64, little endian: XXH3 is no faster for so few bytes, and the native kernels know it."""
    return xxhash.xxh64_digest(payload, seed)[::-1]


def seed_of(key: BlockKey) -> int:
    """With the number of a row: it verifies in its own place of its own block only."""
    return int(key.digest[:16], 16)
