"""Reader: what the rows of a forward read where a policy selects slots, or where positions are re-indexed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.columns import POSITION
from kvpress.forward import Forward
from kvpress.observation import AttentionArguments
from kvpress.policies.selection import SelectionPolicy, Selector, SlotView
from kvpress.rope import Rotation
from kvpress.row_attention import Rows, attend_reindexed, attend_rows
from kvpress.row_format import Rows as StoredRows
from kvpress.table_view import TableView
from kvpress.tensor_parallel import ALONE, HeadShards

if TYPE_CHECKING:
    from kvpress.slots import SlotTable


@dataclass
class Reader:
    """How one layer reads its slots.

    Attributes:
        policy, selector: the selection, if any, and its state in this layer.
        rotation: where keys are stored before rotation and positions are re-indexed.
        shared: all KV heads keep the same tokens.
        heads: the share of the model's heads that this process holds.
    """

    policy: SelectionPolicy | None
    selector: Selector | None
    rotation: Rotation | None
    shared: bool
    heads: HeadShards = ALONE
    # what the last rows attended to: positions, how many slots were in use, and which of these (None: all)
    _last: tuple[Tensor, int, Tensor | None] | None = None

    def read(
        self,
        table: SlotTable,
        forward: Forward,
        query: Tensor,
        keys: StoredRows,
        values: StoredRows,
        arguments: AttentionArguments,
    ) -> Tensor:
        """Output `[batch, query_heads, rows, value_dim]` of rows that see the slots of `table`.

        Args:
            query: before rotation where positions are re-indexed.
            keys, values: all slots, dense, in the order of the table; keys likewise.
        """
        if table.base:
            return self._read_stored(table, forward, query, arguments)
        if forward.rows == 1 or (self.policy is not None and self.policy.selects_for_prompts):
            self._make_room(table, keys)
        tokens, padded = forward.placed, forward.visible is not None
        rows = _rows(table, forward, query, keys, values)
        if forward.rows == 1 or not tokens.padded or self.policy is None or not self.policy.selects_for_prompts:
            return self._read(rows, padded, arguments)
        return self._read_padded(table, forward, rows, arguments)

    def read_one(self, table: SlotTable, forward: Forward, query: Tensor, arguments: AttentionArguments) -> Tensor:
        """As `read`, of a decoded token over a table whose buffers stay where they are, by prepared calls."""
        prepared, visible, newest = table.prepared, forward.visible, forward.placed.newest
        if prepared is None:
            return self.read(table, forward, query, *table.views(), arguments)
        count, index, rotation = table.count, None, None
        ordered = visible is None and isinstance(newest, int) and count == newest + 1
        if self.selector is not None:
            if table.stowage is not None:
                self._make_room(table, table.views()[0])
            index = self.selector.select(TableView(table, forward, query, arguments.scaling, ordered, self))
        self.note(table, index)
        if self.rotation is not None:
            if self._in_order(ordered, index):
                rotation = self.rotation.tables(query, count if index is None else index.shape[-1])
            if rotation is None:
                rows = _rows(table, forward, query, *table.views())
                return attend_reindexed(rows, index, arguments, self.rotation, self.shared)
        output, _ = prepared.attention.attend(
            query,
            count,
            index=index,
            positions=visible,
            rotation=rotation,
            scaling=arguments.scaling,
            softcap=arguments.softcap,
            sinks=arguments.sinks,
        )
        return output

    def _read(self, rows: Rows, padded: bool, arguments: AttentionArguments) -> Tensor:
        """Rows block by block: select, attend."""
        count, slots = rows.query.shape[2], rows.keys.shape[2]
        several = count > 1
        outputs = []
        for first, last in self.policy.blocks(count) if self.policy is not None and several else [(0, count)]:
            end = slots - count + last if several else slots
            block = rows.block(first, last, end)
            ordered = not padded and isinstance(block.newest, int) and end == block.newest + 1
            view = self._view(block, arguments, ordered, decoding=not several)
            index = None if self.selector is None else self.selector.select(view)
            outputs.append(self._attend(block, index, arguments, padded, ordered))
            self._last = (block.positions, block.positions.shape[2], index)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _read_padded(self, table: SlotTable, forward: Forward, rows: Rows, arguments: AttentionArguments) -> Tensor:
        """A prompt is cut into blocks from its first real token on, so batch rows of unequal length are read one by one."""
        tokens, heads, slots = forward.placed, rows.keys.shape[1], rows.keys.shape[2]
        output = rows.query.new_zeros(*rows.query.shape[:3], rows.values.shape[-1])
        last_read = []
        for row in range(rows.query.shape[0]):
            real, one = tokens.positions[row] >= 0, slice(row, row + 1)
            held = rows.held[one]
            if not tokens.counts[row]:
                last_read.append(held.new_full((1, 0), -1, dtype=torch.long))
                continue
            complete = bool((held >= 0).all(dim=1).eq((held >= 0).any(dim=1)).all())
            index = (held[0, 0] >= 0).nonzero().view(-1) if complete else torch.arange(slots, device=held.device)
            alone = Rows(
                rows.query[one, :, real],
                rows.keys[one, :, index],
                rows.values[one, :, index],
                held[:, :, index],
                tokens.positions[one, real],
                tokens.seen[row] - 1,
                slice(0, 0),
            )
            self.rearrange()  # the slots of this row alone
            output[one, :, real] = self._read(alone, not complete, arguments)
            last_read.append(self.read_positions())
            self.rearrange()
        if any(item.dim() == 3 for item in last_read):
            last_read = [item if item.dim() == 3 else item[:, None].expand(-1, heads, -1) for item in last_read]
        longest = max(item.shape[-1] for item in last_read)
        padding = [torch.nn.functional.pad(item, (0, longest - item.shape[-1]), value=-1) for item in last_read]
        self._last = (torch.cat(padding), longest, None)
        return output

    def _view(self, rows: Rows, arguments: AttentionArguments, ordered: bool, *, decoding: bool) -> SlotView:
        """What the selector sees of `rows`."""
        return SlotView(
            query=rows.query,
            keys=rows.keys,
            positions=rows.positions,
            newest=rows.newest,
            scaling=arguments.scaling,
            ordered=ordered,
            ascending=isinstance(rows.new, slice),
            decoding=decoding,
            new=rows.new,
            shared=self.shared,
            rotation=self.rotation,
            heads=self.heads,
        )

    def _in_order(self, ordered: bool, index: Tensor | None) -> bool:
        """Whether a row's list ascends by position, without gaps, as far as slots are `ordered`."""
        return ordered and (index is None or (self.selector is not None and self.selector.complete_lists))

    def _attend(
        self, rows: Rows, index: Tensor | None, arguments: AttentionArguments, padded: bool, ordered: bool
    ) -> Tensor:
        return attend_rows(
            rows,
            index,
            arguments,
            padded=padded,
            rotation=self.rotation,
            in_order=self._in_order(ordered, index),
            shared=self.shared,
        )

    def _make_room(self, table: SlotTable, keys: Any) -> None:
        """With offload: for what the selection will keep, before it exists."""
        if table.stowage is not None and self.selector is not None:
            table.stowage.make_room(self.selector.bytes_to_grow(keys))

    def rearrange(self) -> None:
        """Slots moved."""
        if self.selector is not None:
            self.selector.rearrange()

    def vacate(self) -> None:
        """Slots became empty, the others stand where they stood."""
        if self.selector is not None:
            self.selector.vacate()

    def _read_stored(self, table: SlotTable, forward: Forward, query: Tensor, arguments: AttentionArguments) -> Tensor:
        """One row that reads selected slots of a table whose first slots lie in the tiers."""
        if table.stowage is None or self.selector is None:
            raise RuntimeError("the slots of this table do not lie in the tiers")
        padded, stored = forward.visible is not None, table.stowage.stored_slots(table)
        rows = _rows(table, forward, query, stored, stored)
        ordered = not padded and isinstance(rows.newest, int) and table.count == rows.newest + 1
        self._make_room(table, stored)
        index = self.selector.select(self._view(rows, arguments, ordered, decoding=True))
        self._last = (rows.held, table.count, index)
        if index is None:
            lists = 1 if self.shared else rows.held.shape[1]
            index = torch.arange(table.count, device=query.device).expand(len(rows.held), lists, -1).contiguous()
        rows.held = rows.held[:, : index.shape[1]]
        if padded:
            index = index.masked_fill(rows.held.gather(-1, index.clamp(min=0)) < 0, -1)
        places, copies = stored.places(index)
        (rows.keys, rows.values), rows.copied, rows.attention = stored.copies, copies.holder, copies.attention
        return self._attend(rows, places, arguments, padded=False, ordered=ordered)  # empty slots are in no list

    def reset(self) -> None:
        """Forget what was read, and start the selection anew."""
        self._last = None
        if self.selector is not None:
            self.selector.rearrange()
            self.selector.hits = self.selector.misses = 0

    @property
    def listed(self) -> Tensor | None:
        """The slots `[batch, kv_heads or 1, n]` to which the last rows attended, `None` for all."""
        return None if self._last is None else self._last[2]

    def note(self, table: SlotTable, index: Tensor | None) -> None:
        """Rows attended to the slots `index` of `table`."""
        self._last = (table.columns[POSITION], table.count, index)

    def tensors(self) -> list[Tensor]:
        """Every tensor held, of the selection and of what was read last."""
        last = [] if self._last is None else [held for held in self._last if isinstance(held, Tensor)]
        return last if self.selector is None else [*self.selector.tensors(), *last]

    def read_positions(self) -> Tensor:
        """Positions that the last rows attended to: `[batch, n]`, or `[batch, kv_heads, n]` where heads differ; `-1` last."""
        if self._last is None:
            return torch.empty(0, 0, dtype=torch.long)
        positions, count, index = self._last
        positions = positions[..., :count].long()
        if positions.dim() == 2:
            return positions
        if self.shared and (index is None or index.shape[1] == 1):
            positions = positions[:, :1]
        if index is not None:
            heads = max(index.shape[1], positions.shape[1])
            index = index.expand(-1, heads, -1)
            positions = positions.expand(-1, heads, -1).gather(-1, index.clamp(min=0)).masked_fill(index < 0, -1)
        last = torch.iinfo(torch.long).max
        read = positions.masked_fill(positions < 0, last).sort(dim=-1).values
        read = read.masked_fill(read == last, -1)
        return read[:, 0] if read.shape[1] == 1 else read


def _rows(table: SlotTable, forward: Forward, query: Tensor, keys: Any, values: Any) -> Rows:
    """The rows of a forward over the slots of `table`."""
    tokens = forward.placed
    return Rows(query, keys, values, table.positions, tokens.positions, tokens.newest, forward.new)
