"""Stowage: where the keys and values of one layer's slots lie between two forwards.

A table stays as it is while the near tier has room for it. When it has none, a *growing* table is cut into blocks of consecutive slots,
which never change again and go to the tiers; the slots behind the last complete block, the tail, stay near. For each forward all of them
are put together in working memory. A *steady* table overwrites slots anywhere, so it stays near: its budget must fit there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.errors import CacheStateError
from kvpress.memory import growth, held_bytes, storages
from kvpress.offload.attached import Attached
from kvpress.offload.block_writer import NAMES, BlockWriter, as_stored, stored_shapes
from kvpress.offload.errors import TierClosedError, TierFullError
from kvpress.offload.hot_slots import HotSlots
from kvpress.offload.row_source import RowSource
from kvpress.offload.stored_slots import StoredSlots
from kvpress.offload.working import Reading, StoredBlock, WorkingMemory, buffer_like, read_all, shaped, shaped_bytes

if TYPE_CHECKING:
    from kvpress.slots import SlotTable

Buffers = tuple[Tensor, Tensor]


class Stowage:
    """The stowage of one layer.

    Attributes:
        blocks: of the first slots, in order, `options.block` slots each.
        held: bytes of the near tier that are held for this layer.
        selecting: the forward under way reads only some slots: they are taken with `stored_slots`, and nothing else is fetched.

    Args:
        apart, together: how blocks are written, see `BlockWriter`.
    """

    def __init__(self, attached: Attached, layer: int, apart: bool = False, together: bool | None = None) -> None:
        self.attached = attached
        self.layer = layer
        self.blocks: list[StoredBlock] = []
        self.held = 0
        self.selecting = False
        self._writer = BlockWriter(attached.name, layer, attached.options.block, apart, together)
        self._tail: Buffers | None = None  # set aside while the table is in working memory
        self._fetched: Tensor | None = None  # the keys in working memory
        self._ahead: Buffers | None = None  # into which the next forward's blocks are read
        self._broken = False  # putting away broke off
        self._beside = 0  # bytes of what the layer holds beside its table
        self._hot: HotSlots | None = None
        self.row_source: RowSource | None = None  # what `StoredSlots` knows of the blocks
        self._table: weakref.ref[SlotTable] | None = None
        attached.stowages[layer] = weakref.ref(self)

    def begin(self, table: SlotTable) -> None:
        """Forget everything, for an empty `table`."""
        self._invalidate()
        self.attached.release(self.layer)
        self._drop_from(0)
        self._tail = self._fetched = self._hot = None
        self._beside, self.selecting, self._broken = 0, False, False
        self.attached.account.release(self.held)
        self.held = 0
        self.bind(table)

    def bind(self, table: SlotTable) -> None:
        """`table` is the one that this is the stowage of."""
        self._table = weakref.ref(table)
        table.stowage = self

    # -- a forward -----------------------------------------------------------------------------------------------------

    def fetch(self, table: SlotTable, tokens: int) -> None:
        """Put all keys and values of `table` together, with room for `tokens` more, where they do not lie near already.

        Raises:
            TierError: a block is lost or cannot be read, or there is no room for working memory.
            CacheStateError: the end of an earlier forward broke off.
        """
        if self._broken:
            raise CacheStateError(
                f"layer {self.layer}: an earlier forward could not be put away. Call cache.reset() and start again"
            )
        if (self.selecting and table.base) or self._is_near(table, tokens):
            return
        buffers = self._read_ahead(table, tokens)
        if buffers is None:
            memory = self._borrow(table, table.count + tokens)
            buffers = self._buffers(table, tokens, memory)
            read_all(self.attached.manager, self._readings(buffers), memory.staging)
        self._tail = table.keys, table.values
        for whole, tail in zip(buffers, self._tail, strict=True):
            whole[:, :, table.base : table.count] = tail[:, :, : table.count - table.base]
        table.keys, table.values, table.base = *buffers, 0
        self._fetched = table.keys
        self.attached.prefetch(self.layer)

    def stow(self, table: SlotTable, rows: int, beside: Sequence[Tensor] = ()) -> None:
        """The end of a forward: what does not stay near goes to the tiers.

        Args:
            rows: tokens of the forward.
            beside: other tensors that the layer holds, accounted for with the table's.

        Raises:
            TierFullError: no tier has room for it.
            TierClosedError: the cache was closed.
        """
        self.attached.check_open()
        if table.is_empty:
            return
        self._beside = _bytes_beside(table, beside)
        self._broken = True  # until all is put away
        self._stow(table)
        self._broken = False
        if rows > 1:  # columns may have grown into other buffers, and what is beside them hold the old ones
            self._beside = _bytes_beside(table, beside)
            self._settle(table)
            self.attached.let_go(rows * table.full_bytes_per_token)

    def _stow(self, table: SlotTable) -> None:
        if table.base and table.count - table.base < self.attached.options.block:
            self.attached.release(self.layer)
            self._settle(table)
        elif table.base or (self._fetched is not None and table.keys is self._fetched):
            self._put_away(table)
        else:  # it lay near, or an eviction made new buffers, and the blocks hold what is no more
            if self._fetched is not None:
                self._leave_working_memory()
            self._drop_from(0)
            if not self._stays_near(table):
                self._put_away(table)

    def cool(self) -> None:
        """Give up the near copies of what the tiers hold anyway."""
        if self._hot is not None:
            released = min(self._hot.nbytes, self.held)
            self._hot = None
            self.held -= released
            self.attached.account.release(released)

    def lower(self) -> None:
        """Give up the near memory of a table that may as well lie in the tiers.

        Raises:
            TierFullError: no tier takes it; it lies where it lay.
        """
        table = None if self._table is None else self._table()
        if table is None or table.is_empty or table.base or self._fetched is not None:
            return
        if table.owned and table.spare is None and table.count >= self.attached.options.block:
            try:
                self._put_away(table)
            except TierFullError:
                self._drop_from(0)
                raise

    @property
    def reads_rows(self) -> bool:
        """Whether decoded tokens need few slots of this layer."""
        return self._writer.together is not None

    def make_room(self, beside: int) -> None:
        """Hold `beside` bytes more, until the end of the forward, for what a selection is about to keep.

        Raises:
            TierFullError: there is no room.
        """
        self._hold_more(beside)

    def stored_slots(self, table: SlotTable) -> StoredSlots:
        """The slots of a table of which only some will be read."""
        return StoredSlots(self, table)

    def hot_slots(self, table: SlotTable) -> HotSlots:
        """The near copies of this layer."""
        if self._hot is None:
            self._hot = HotSlots(table.form)
        return self._hot

    @staticmethod
    def allocate(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `kvpress.memory.allocate`, in memory that goes back to the system when it is freed."""
        dtype = dtype or like.dtype
        return shaped(buffer_like(prod(shape) * dtype.itemsize, like), [shape], [dtype])[0]

    # -- verbs of the cache --------------------------------------------------------------------------------------------

    def cut(self, table: SlotTable) -> None:
        """Tokens were taken back, down to `table.count` slots: later blocks go, the rest of the first of them returns to the tail."""
        if self._hot is not None:
            self._hot.forget_from(table.count)
        if table.count >= table.base:
            return
        self._invalidate()
        block = self.attached.options.block
        whole = table.count // block
        keys, values = self._new_tail(table, block)
        read_all(
            self.attached.manager,
            self.blocks[whole].readings({"key": keys, "value": values}),
            self._block_buffer(table),
        )
        self._hot = None
        self._drop_from(whole)
        table.keys, table.values, table.base = keys, values, whole * block
        self._settle(table)

    def select_batch(self, table: SlotTable, rows: Sequence[int]) -> None:
        """Batch row `i` of the blocks becomes what row `rows[i]` was; the table has seen to what lies near."""
        self._invalidate()
        self.blocks = [block.selected(rows) for block in self.blocks]
        if self._hot is not None:
            self._hot.select_batch(rows)
        if table.base:
            self._settle(table)
        elif not self._stays_near(table):
            self._put_away(table)

    def gathered(self, table: SlotTable) -> Buffers:
        """All keys and values of `table`, in buffers that are nobody else's and not accounted for."""
        keys, values = self._allocated(table, table.count)
        read_all(self.attached.manager, self._readings((keys, values)), self._block_buffer(table))
        for whole, tail in ((keys, table.keys), (values, table.values)):
            whole[:, :, table.base :] = tail[:, :, : table.count - table.base]
        return keys, values

    def readings_ahead(self) -> tuple[WorkingMemory, list[Reading]] | None:
        """Working memory for this layer's next forward, and what to read into it; None where there is no room."""
        table = None if self._table is None else self._table()
        if table is None or not table.base:
            return None
        if (memory := self._try_borrow(table, table.count, ahead=True)) is None:
            return None
        self._ahead = self._buffers(table, 0, memory)
        return memory, self._readings(self._ahead)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stowage:
        attached = memo.get(id(self.attached)) or self.attached.__deepcopy__(memo)
        copied = memo[id(self)] = Stowage(attached, self.layer)
        copied._writer = self._writer.copy(attached.name)
        copied.blocks, copied.held, copied._beside = list(self.blocks), self.held, self._beside
        return copied

    # -- what selected slots ask for -----------------------------------------------------------------------------------

    def keys_between(self, table: SlotTable, first: int, last: int) -> tuple[int, Tensor]:
        """The first slot of the block of slot `first`, and the keys from there to slot `last - 1` or beyond, in working memory until the
        next call or the end of the forward."""
        size = self.attached.options.block
        number = first // size
        start, behind = number * size, -(-last // size)
        end = table.count if last > table.base else behind * size
        memory = self._borrow(table, end - start)
        shapes, dtypes = stored_shapes(table, end - start)
        keys = shaped(memory.buffer, shapes[:1], dtypes[:1])[0]
        readings = []
        for place, block in enumerate(self.blocks[number:behind]):
            readings += block.readings({"key": keys[:, :, place * size : (place + 1) * size]})
        read_all(self.attached.manager, readings, memory.staging)
        if end > table.base:
            keys[:, :, table.base - start :] = table.keys[:, :, : end - table.base]
        return start, keys

    def block_tensors(self, table: SlotTable, block: StoredBlock, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors `names` of a block as they were written; valid until the next is asked for."""
        manager = self.attached.manager
        shapes, dtypes = stored_shapes(table, self.attached.options.block)
        like = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, shape, dtype in zip(NAMES, shapes, dtypes, strict=True)
        }
        for reading in block.readings({name: like[name] for name in names}):
            # bringing it near would cost another block its place
            if block.layout is not None or not manager.is_near(reading.key):
                found = reading.staged(manager, self._borrow(table, 0, again=True).staging)
                yield from ((name, found[name]) for name in reading.out if name in names)
                continue
            with manager.use([reading.key]) as held:
                yield from ((name, held[0][name]) for name in reading.out if name in names)

    def may_hold(self, nbytes: int) -> bool:
        """Hold more of the near tier for this layer, if that costs nobody else's place."""
        if not self.attached.account.hold(nbytes):
            return False
        self.held += nbytes
        return True

    def must_hold(self, nbytes: int) -> None:
        """Hold more of the near tier for this layer.

        Raises:
            TierFullError: there is no room.
        """
        self.attached.hold(nbytes, self)
        self.held += nbytes

    # -- inside --------------------------------------------------------------------------------------------------------

    def _is_near(self, table: SlotTable, tokens: int) -> bool:
        """Whether the table lies near, and may grow there by `tokens`; if not, it makes room."""
        if table.base:
            return False
        if table.spare is not None or not self.attached.keeps_near:
            return True
        extra = (table.capacity_for(table.count + tokens) - table.capacity) * table.bytes_per_token
        if self.attached.account.hold(extra):
            self.held += max(extra, 0)
            return True
        try:
            self.attached.lower(self)
        except TierFullError:  # then another layer's has to
            self.must_hold(extra)
            return True
        return False

    def _stays_near(self, table: SlotTable) -> bool:
        """Account for a table that lies in buffers of its own, or of the model; False where there is no room for it."""
        if table.spare is not None or table.rows is not None:
            self._settle(table)
            return True
        if not self.attached.keeps_near:
            return table.owned and table.count < self.attached.options.block
        block = self._writer.layout(table)
        tail = shaped_bytes(*stored_shapes(table, self.attached.options.block))
        self.attached.set_aside(tail + (0 if block is None else block.nbytes(table.keys.shape[0])))
        size = self._near_bytes(table)
        if not table.owned:
            size = table.capacity_for(table.count) * table.bytes_per_token + self._beside
        if not self.attached.account.hold(size - self.held):
            return False
        self.held = max(size, self.held)
        table.take_over()
        self._settle(table)
        return True

    def _put_away(self, table: SlotTable) -> None:
        """Complete blocks to the tiers, the tail to buffers of its own."""
        size, full = self.attached.options.block, None
        try:
            while (len(self.blocks) + 1) * size <= table.count:
                self.blocks.append(self._writer.put(self.attached.manager, table, len(self.blocks), self._holding))
        except TierFullError as error:
            full = error
        base = len(self.blocks) * size
        tail, count = (table.keys, table.values) if table.base else self._tail, table.count - base
        if tail is None or tail[0].shape[0] != table.keys.shape[0] or tail[0].shape[2] < count:
            try:
                tail = self._new_tail(table, max(size, count))
            except TierFullError as error:
                raise full or error from error
        for part, whole in zip(tail, (table.keys, table.values), strict=True):
            part[:, :, :count] = as_stored(table, whole[:, :, base - table.base : table.count - table.base])
        table.lie(*tail, base)
        self._leave_working_memory()
        self._settle(table)

    @contextmanager
    def _holding(self, nbytes: int) -> Iterator[None]:
        """Account for `nbytes` of copies meanwhile."""
        self._hold_more(nbytes)
        try:
            yield
        finally:
            self.held -= nbytes
            self.attached.account.release(nbytes)

    def _new_tail(self, table: SlotTable, slots: int) -> Buffers:
        """Buffers for the tail, accounted for before they exist.

        Raises:
            TierFullError: there is no room.
        """
        shapes, dtypes = stored_shapes(table, slots)
        self._hold_more(shaped_bytes(shapes, dtypes))
        return self._allocated(table, slots)

    def _allocated(self, table: SlotTable, slots: int) -> Buffers:
        shapes, dtypes = stored_shapes(table, slots)
        keys, values = (self.allocate(shape, table.keys, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        return keys, values

    def _leave_working_memory(self) -> None:
        self._fetched = self._tail = None
        self.attached.release(self.layer)

    def _near_bytes(self, table: SlotTable) -> int:
        return held_bytes(table.tensors()) + self._beside + (0 if self._hot is None else self._hot.nbytes)

    def _settle(self, table: SlotTable) -> None:
        """Make the account equal what lies near."""
        hot, size = self._hot, self._near_bytes(table)
        self._hold_more(size - self.held)
        if self._hot is not hot:  # near copies had to go
            size = self._near_bytes(table)
        self.attached.account.release(self.held - size)
        self.held = size

    def _hold_more(self, nbytes: int) -> None:
        if nbytes > 0 and not self.may_hold(nbytes):
            self.cool()
            self.must_hold(nbytes)

    def _borrow(self, table: SlotTable, slots: int, *, again: bool = False) -> WorkingMemory:
        """Working memory for `slots` slots and some spare ones; `again`: what this layer has is enough."""
        mine = self.attached.lent_to(self.layer) if again else None
        memory = mine or self._try_borrow(table, slots)
        if memory is None:
            raise RuntimeError("working memory is refused only ahead of time")
        return memory

    def _try_borrow(self, table: SlotTable, slots: int, *, ahead: bool = False) -> WorkingMemory | None:
        size = shaped_bytes(*stored_shapes(table, _roomy(slots)))
        return self.attached.borrow(self.layer, size, self._block_bytes(table), ahead=ahead)

    def _block_bytes(self, table: SlotTable) -> int:
        """Of one block on its way, with the most batch rows that any has."""
        shapes, dtypes = stored_shapes(table, self.attached.options.block)
        batch = max((block.batch for block in self.blocks), default=1)
        layout = self._writer.layout(table)
        if layout is not None:
            return layout.nbytes(batch)
        return shaped_bytes([(batch, *shape[1:]) for shape in shapes], dtypes)

    def _block_buffer(self, table: SlotTable) -> Tensor:
        return buffer_like(self._block_bytes(table), torch.empty(0))

    def _buffers(self, table: SlotTable, tokens: int, memory: WorkingMemory) -> Buffers:
        keys, values = shaped(memory.buffer, *stored_shapes(table, _roomy(table.count + tokens)))
        return keys, values

    def _readings(self, buffers: Buffers) -> list[Reading]:
        size = self.attached.options.block
        readings = []
        for number, block in enumerate(self.blocks):
            slots = slice(number * size, (number + 1) * size)
            readings += block.readings({"key": buffers[0][:, :, slots], "value": buffers[1][:, :, slots]})
        return readings

    def _read_ahead(self, table: SlotTable, tokens: int) -> Buffers | None:
        """Buffers that the blocks were read into ahead of time."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or self.attached.read_ahead(self.layer) is None:
            return None
        return ahead if ahead[0].shape[2] >= table.count + tokens else None

    def _invalidate(self) -> None:
        """What was read ahead is out of date."""
        self._ahead = None
        self.attached.forget(self.layer)

    def _drop_from(self, first: int) -> None:
        gone, self.blocks = self.blocks[first:], self.blocks[:first]
        if gone:
            with suppress(TierClosedError):
                self.attached.manager.drop(self.attached.name, [key for block in gone for key in block.keys])


def _bytes_beside(table: SlotTable, beside: Sequence[Tensor]) -> int:
    """Bytes of tensors that the table does not hold anyway."""
    own = storages(table.tensors())
    return sum(nbytes for where, nbytes in storages(beside).items() if where not in own)


def _roomy(slots: int) -> int:
    """Slots with some spare ones for the tokens of the next forward."""
    return slots + growth(slots)
