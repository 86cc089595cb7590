"""All keys and values of one layer, put together from its blocks and its tail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvpress.memory import allocate, growth
from kvpress.offload.attached import Attached
from kvpress.offload.block_writer import stored_bytes, stored_shapes
from kvpress.offload.layer_blocks import LayerBlocks
from kvpress.offload.working import Reading, WorkingMemory, read_all, shaped

if TYPE_CHECKING:
    from kvpress.key_values import KeyValues

Buffers = tuple[Tensor, Tensor]


class GatheredSlots:
    """The slots of one layer in working memory, from the beginning of a forward to its end.

    Args:
        attached: the tiers, which lend working memory.
        layer: index of the layer.
        blocks: of the first slots.

    Attributes:
        tail: the table's own buffers, set aside while it lies in working memory.
    """

    def __init__(self, attached: Attached, layer: int, blocks: LayerBlocks) -> None:
        self.attached, self.layer, self.blocks = attached, layer, blocks
        self.tail: Buffers | None = None
        self._keys: Tensor | None = None  # those in working memory
        # slots of the buffers into which the next forward's blocks are read, and how many blocks there were; the memory of these buffers
        self._ahead: tuple[int, int] | None = None  # may be given back meanwhile

    def holds(self, table: KeyValues) -> bool:
        """Whether the table lies in working memory: no eviction made it buffers of its own."""
        return self._keys is not None and table.keys is self._keys

    @property
    def in_use(self) -> bool:
        """Whether slots were put together since `leave`."""
        return self._keys is not None

    def fetch(self, table: KeyValues, tokens: int) -> None:
        """Let `table` lie in working memory, with room for `tokens` more.

        Raises:
            TierError: a block is lost or cannot be read, or there is no room for working memory.
        """
        buffers = self._read_ahead(table, tokens)
        if buffers is None:
            memory = self.borrow(table, table.count + tokens)
            buffers = _buffers(table, _roomy(table.count + tokens), memory)
            read_all(self.attached.manager, self._readings(buffers), memory.staging)
        self.tail = table.keys, table.values
        _put_tail(table, buffers)
        table.keys, table.values, table.base = *buffers, 0
        self._keys = table.keys

    def leave(self) -> None:
        """The forward has ended: working memory serves others."""
        self._keys = self.tail = None
        self.attached.release(self.layer)

    def copied(self, table: KeyValues) -> Buffers:
        """All keys and values of `table`, in buffers that are nobody else's and not accounted for."""
        keys, values = buffers = allocated(table, table.count)
        self.blocks.read(table, {"key": keys, "value": values})
        _put_tail(table, buffers)
        return buffers

    def keys_between(self, table: KeyValues, first: int, last: int) -> tuple[int, Tensor]:
        """The first slot of the block of slot `first`, and the keys from there to slot `last - 1` or beyond, in working memory until the
        next call or the end of the forward."""
        size = self.blocks.size
        number, behind = first // size, -(-last // size)
        start, end = number * size, table.count if last > table.base else behind * size
        memory = self.borrow(table, end - start)
        shapes, dtypes = stored_shapes(table, end - start)
        keys = shaped(memory.buffer, shapes[:1], dtypes[:1])[0]
        read_all(self.attached.manager, self.blocks.readings({"key": keys}, number, behind), memory.staging)
        if end > table.base:
            keys[:, :, table.base - start :] = table.keys[:, :, : end - table.base]
        return start, keys

    def staging(self, table: KeyValues) -> Tensor:
        """A flat buffer for one block on its way."""
        return (self.attached.lent_to(self.layer) or self.borrow(table, 0)).staging

    def borrow(self, table: KeyValues, slots: int) -> WorkingMemory:
        """Working memory for `slots` slots and some spare ones.

        Raises:
            TierFullError: there is no room for it.
        """
        memory = self._try_borrow(table, slots)
        if memory is None:
            raise RuntimeError("working memory is refused only ahead of time")
        return memory

    # -- ahead of time -------------------------------------------------------------------------------------------------

    def readings_ahead(self, table: KeyValues) -> tuple[WorkingMemory, list[Reading]] | None:
        """Working memory for the next forward, and what to read into it; None where there is no room."""
        if (memory := self._try_borrow(table, table.count, ahead=True)) is None:
            return None
        slots = _roomy(table.count)
        self._ahead = slots, len(self.blocks.listed)
        return memory, self._readings(_buffers(table, slots, memory))

    def forget_ahead(self) -> None:
        """What was read ahead is out of date."""
        self._ahead = None
        self.attached.forget(self.layer)

    def _read_ahead(self, table: KeyValues, tokens: int) -> Buffers | None:
        """Buffers that all blocks were read into ahead of time."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or (memory := self.attached.read_ahead(self.layer)) is None:
            return None
        slots, blocks = ahead  # tokens that read only some slots may have come since, and have filled other blocks
        if slots < table.count + tokens or blocks != len(self.blocks.listed):
            return None
        return _buffers(table, slots, memory)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _try_borrow(self, table: KeyValues, slots: int, *, ahead: bool = False) -> WorkingMemory | None:
        size = stored_bytes(table, _roomy(slots))
        return self.attached.borrow(self.layer, size, self.blocks.block_bytes(table), ahead=ahead)

    def _readings(self, buffers: Buffers) -> list[Reading]:
        return self.blocks.readings({"key": buffers[0], "value": buffers[1]})


def allocated(table: KeyValues, slots: int) -> Buffers:
    """Buffers for the keys and values of `slots` slots, as they are stored."""
    shapes, dtypes = stored_shapes(table, slots)
    keys, values = (allocate(shape, table.keys, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return keys, values


def _buffers(table: KeyValues, slots: int, memory: WorkingMemory) -> Buffers:
    keys, values = shaped(memory.buffer, *stored_shapes(table, slots))
    return keys, values


def _put_tail(table: KeyValues, buffers: Buffers) -> None:
    """The slots that lie in the table's own buffers, behind those of its blocks."""
    for whole, tail in zip(buffers, (table.keys, table.values), strict=True):
        whole[:, :, table.base : table.count] = tail[:, :, : table.count - table.base]


def _roomy(slots: int) -> int:
    """Slots with some spare ones for the tokens of the next forward."""
    return slots + growth(slots)
