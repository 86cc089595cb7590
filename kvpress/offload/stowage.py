"""Stowage: where the keys and values of one layer's slots lie between two forwards.

A table stays as it is while the near tier has room for it. When it has none, a *growing* table is cut into blocks of consecutive slots,
which never change again and go to the tiers; the slots behind the last complete block, the tail, stay near. For each forward all of them
are put together in working memory. A *steady* table overwrites slots anywhere, so it stays near: its budget must fit there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvpress.errors import CacheStateError
from kvpress.memory import held_bytes, storages
from kvpress.offload.attached import Attached
from kvpress.offload.block_writer import BlockWriter, as_stored, stored_bytes
from kvpress.offload.errors import TierFullError
from kvpress.offload.gathered import Buffers, GatheredSlots, allocated
from kvpress.offload.layer_blocks import LayerBlocks
from kvpress.offload.near_copies import NearCopies
from kvpress.offload.row_source import RowSource
from kvpress.offload.stored_slots import StoredSlots
from kvpress.offload.working import Reading, StoredBlock, WorkingMemory

if TYPE_CHECKING:
    from kvpress.key_values import KeyValues
    from kvpress.slots import SlotTable


class Stowage:
    """The stowage of one layer.

    Attributes:
        held: bytes of the near tier that are held for this layer.
        broken: what lies where is not known until `begin`.
        selecting: the forward under way reads only some slots: they are taken with `stored_slots`, and nothing else is fetched.

    Args:
        apart, together: how blocks are written, see `BlockWriter`.
    """

    def __init__(self, attached: Attached, layer: int, apart: bool = False, together: bool | None = None) -> None:
        self.attached = attached
        self.layer = layer
        self.held = 0
        self.selecting = False
        self._blocks = LayerBlocks(attached, BlockWriter(attached.name, layer, attached.options.block, apart, together))
        self.gathered_slots = GatheredSlots(attached, layer, self._blocks)
        self.broken = False  # putting away, or something done to all layers, broke off
        self._beside = 0  # bytes of what the layer holds beside its table
        # bytes held at the end of the former forward, in all and of each tensor that may grow
        self._sizes: list[int] = []
        self.copies = NearCopies(self)
        self.row_source: RowSource | None = None  # what `StoredSlots` knows of the blocks
        self._table: weakref.ref[SlotTable] | None = None
        attached.stowages[layer] = weakref.ref(self)

    def begin(self, table: SlotTable) -> None:
        """Forget everything, for an empty `table`."""
        self._invalidate()
        self.gathered_slots.leave()
        self._blocks.drop_from(0)
        self.copies.slots, self._beside, self.selecting, self.broken = None, 0, False, False
        self.release(self.held)
        self.bind(table)

    def bind(self, table: SlotTable) -> None:
        """`table` is the one that this is the stowage of."""
        self._table = weakref.ref(table)
        table.stowage = self

    # -- a forward -----------------------------------------------------------------------------------------------------

    def check_whole(self) -> None:
        """Raise CacheStateError when an earlier forward, or something done to all layers, broke off in the tiers."""
        if self.broken:
            raise CacheStateError(
                f"layer {self.layer}: what came before could not be put away. Call cache.reset() and start again"
            )

    @property
    def serves_steps(self) -> bool:
        """Whether a token that leaves everything of the size that it has needs no look at the tiers before and after it."""
        return not self.broken and self.attached.is_open and self.attached.lent_to(self.layer) is None

    def fetch(self, table: SlotTable, tokens: int) -> None:
        """Put all keys and values of `table` together, with room for `tokens` more, where they do not lie near already.

        Raises:
            TierError: a block is lost or cannot be read, or there is no room for working memory.
        """
        if (self.selecting and table.base) or self._is_near(table, tokens):
            return
        self.gathered_slots.fetch(table, tokens)
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
        if rows == 1 and self._is_settled(table, beside):
            return
        self._beside = _bytes_beside(table, beside)
        self.broken = True  # until all is put away
        self._stow(table)
        self.broken = False
        if rows > 1:  # columns may have grown into other buffers, and what is beside them hold the old ones
            self._beside = _bytes_beside(table, beside)
            self._settle(table)
            self.attached.let_go(rows * table.full_bytes_per_token)

    def _is_settled(self, table: SlotTable, beside: Sequence[Tensor]) -> bool:
        """Whether a decoded token left everything as it was: nothing to put away, nothing of another size, nothing held meanwhile."""
        tensors = (*table.columns.values(), *beside)
        former, self._sizes = self._sizes, [self.held, *(each.untyped_storage().nbytes() for each in tensors)]
        return (
            former == self._sizes
            and 0 < table.count - table.base < self.attached.options.block
            and table.base > 0
            and self.copies.hold_tail(table)
            and self.attached.lent_to(self.layer) is None
        )

    def _stow(self, table: SlotTable) -> None:
        if table.base and table.count - table.base < self.attached.options.block:
            self.gathered_slots.leave()
            self._settle(table)
        elif table.base or self.gathered_slots.holds(table):
            self._put_away(table)
        else:  # it lay near, or an eviction made new buffers, and the blocks hold what is no more
            if self.gathered_slots.in_use:
                self.gathered_slots.leave()
            self._blocks.drop_from(0)
            if not self._stays_near(table):
                self._put_away(table)

    def cool(self) -> None:
        """Give up the near copies of what the tiers hold anyway."""
        self.copies.give_up(None if self._table is None else self._table())

    def lower(self) -> None:
        """Give up the near memory of a table that may as well lie in the tiers.

        Raises:
            TierFullError: no tier takes it; it lies where it lay.
        """
        table = None if self._table is None else self._table()
        if table is None or table.is_empty or table.base or self.gathered_slots.in_use:
            return
        if table.owned and table.spare is None and table.count >= self.attached.options.block:
            try:
                self._put_away(table)
            except TierFullError:
                self._blocks.drop_from(0)
                raise

    @property
    def blocks(self) -> list[StoredBlock]:
        """Those of the first slots, in order, `options.block` slots each."""
        return self._blocks.listed

    @property
    def reads_rows(self) -> bool:
        """Whether decoded tokens need few slots of this layer."""
        return self._blocks.writer.together is not None

    def make_room(self, beside: int) -> None:
        """Hold `beside` bytes more, until the end of the forward, for what a selection is about to keep.

        Raises:
            TierFullError: there is no room.
        """
        self._hold_more(beside)

    def stored_slots(self, table: SlotTable) -> StoredSlots:
        """The slots of a table of which only some will be read."""
        return StoredSlots(self, table)

    # -- verbs of the cache --------------------------------------------------------------------------------------------

    def cut(self, table: SlotTable) -> None:
        """Tokens were taken back, down to `table.count` slots: later blocks go, the rest of the first of them returns to the tail."""
        self.copies.cut(table)
        if table.count >= table.base:
            return
        self._invalidate()
        block = self.attached.options.block
        whole = table.count // block
        keys, values = self._new_tail(table, block)
        self._blocks.read(table, {"key": keys, "value": values}, whole, whole + 1)
        self.copies.slots = None
        self._blocks.drop_from(whole)
        table.keys, table.values, table.base = keys, values, whole * block
        self._settle(table)

    def select_batch(self, table: SlotTable, rows: Sequence[int]) -> None:
        """Batch row `i` of the blocks becomes what row `rows[i]` was; the table has seen to what lies near."""
        self._invalidate()
        self._blocks.select_batch(rows)
        self.copies.select_batch(table, rows)
        if table.base:
            self._settle(table)
        elif not self._stays_near(table):
            self._put_away(table)

    def gathered(self, table: KeyValues) -> Buffers:
        """As `GatheredSlots.copied`."""
        return self.gathered_slots.copied(table)

    def readings_ahead(self) -> tuple[WorkingMemory, list[Reading]] | None:
        """As `GatheredSlots.readings_ahead`; None where nothing is to be read."""
        table = None if self._table is None else self._table()
        if table is None or not table.base:
            return None
        return self.gathered_slots.readings_ahead(table)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stowage:
        attached = memo.get(id(self.attached)) or self.attached.__deepcopy__(memo)
        copied = memo[id(self)] = Stowage(attached, self.layer)
        copied._blocks = self._blocks.copy(attached)
        copied.gathered_slots = GatheredSlots(attached, self.layer, copied._blocks)
        copied.held, copied._beside, copied.broken = self.held, self._beside, self.broken
        return copied

    # -- what selected slots ask for -----------------------------------------------------------------------------------

    def block_tensors(self, table: SlotTable, block: StoredBlock, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """As `LayerBlocks.tensors`."""
        return self._blocks.tensors(table, block, names, lambda: self.gathered_slots.staging(table))

    def may_hold(self, nbytes: int) -> bool:
        """Hold more of the near tier for this layer, if that costs nobody else's place."""
        if not self.attached.account.hold(nbytes):
            return False
        self.held += nbytes
        return True

    def holds_in_place_of_tables(self, nbytes: int) -> bool:
        """As `may_hold`, where other layers' tables may move down for it."""
        if not self.attached.hold_in_place_of_tables(nbytes, self):
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

    def release(self, nbytes: int) -> None:
        """Give `nbytes` of the near tier back."""
        nbytes = min(nbytes, self.held)
        self.held -= nbytes
        self.attached.account.release(nbytes)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _is_near(self, table: SlotTable, tokens: int) -> bool:
        """Whether the table lies near, and may grow there by `tokens`; if not, it makes room."""
        if table.base:
            return False
        if table.spare is not None or not self.attached.keeps_near:
            return True
        extra = (table.capacity_for(table.count + tokens) - table.capacity) * table.slot_bytes
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
        rows = self._blocks.writer.layout(table)
        tail = stored_bytes(table, self.attached.options.block)
        self.attached.set_aside(tail + (0 if rows is None else rows.nbytes(table.keys.shape[0])))
        size = self._near_bytes(table)
        if not table.owned:
            size = table.capacity_for(table.count) * table.slot_bytes + self._beside
        if not self.attached.account.hold(size - self.held):
            return False
        self.held = max(size, self.held)
        table.take_over()
        self._settle(table)
        return True

    def _put_away(self, table: SlotTable) -> None:
        """Complete blocks to the tiers, the tail to buffers of its own."""
        full = None
        try:
            self._blocks.put(table, self._holding)
        except TierFullError as error:
            full = error
        base = self._blocks.slots
        tail, count = (table.keys, table.values) if table.base else self.gathered_slots.tail, table.count - base
        if tail is None or tail[0].shape[0] != table.keys.shape[0] or tail[0].shape[2] < count:
            try:
                tail = self._new_tail(table, max(self._blocks.size, count))
            except TierFullError as error:
                raise full or error from error
        for part, whole in zip(tail, (table.keys, table.values), strict=True):
            part[:, :, :count] = as_stored(table, whole[:, :, base - table.base : table.count - table.base])
        table.lie(*tail, base)
        self.gathered_slots.leave()
        self._settle(table)

    @contextmanager
    def _holding(self, nbytes: int) -> Iterator[None]:
        """Account for `nbytes` of copies meanwhile."""
        self._hold_more(nbytes)
        try:
            yield
        finally:
            self.release(nbytes)

    def _new_tail(self, table: SlotTable, slots: int) -> Buffers:
        """Buffers for the tail, accounted for before they exist.

        Raises:
            TierFullError: there is no room.
        """
        self._hold_more(stored_bytes(table, slots))
        return allocated(table, slots)

    def _near_bytes(self, table: SlotTable) -> int:
        return held_bytes([*table.tensors(), *self.copies.tensors()]) + self._beside

    def _settle(self, table: SlotTable) -> None:
        """Make the account equal what lies near."""
        copies, size = self.copies.slots, self._near_bytes(table)
        self._hold_more(size - self.held)
        if self.copies.slots is not copies:  # they had to go
            size = self._near_bytes(table)
        self.release(self.held - size)

    def _hold_more(self, nbytes: int) -> None:
        if nbytes > 0 and not self.may_hold(nbytes):
            self.cool()
            self.must_hold(nbytes)

    def _invalidate(self) -> None:
        """What was read ahead is out of date."""
        self.gathered_slots.forget_ahead()


def _bytes_beside(table: SlotTable, beside: Sequence[Tensor]) -> int:
    """Bytes of tensors that the table does not hold anyway."""
    own = storages(table.tensors())
    return sum(nbytes for where, nbytes in storages(beside).items() if where not in own)
