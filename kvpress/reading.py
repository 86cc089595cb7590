"""Attention of a forward's rows where a policy selects slots, or where positions are re-indexed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kvpress.forward import Forward
from kvpress.kernels.attention import attend
from kvpress.kernels.attention.turned import attend_turned
from kvpress.kernels.scores import select_slots
from kvpress.observation import AttentionArguments
from kvpress.policies.selection import SelectionPolicy, Selector, SlotView
from kvpress.prepared import POSITION
from kvpress.rope import Rotation
from kvpress.row_format import Rows as StoredRows
from kvpress.row_format import part, parts, unpacked
from kvpress.table_view import TableView
from kvpress.tensor_parallel import ALONE, HeadShards

if TYPE_CHECKING:
    from kvpress.kernels.attention.prepared import PreparedAttention
    from kvpress.slots import SlotTable


_ALL = slice(None)


@dataclass(slots=True)
class Rows:
    """Query rows and the slots before them.

    Attributes:
        query: `[batch, query_heads, rows, dim]`.
        keys, values, positions: of the slots, `[batch, heads, slots, …]`.
        row_positions: `[batch or 1, rows]`.
        newest: position of the last row: an int where all batch rows are alike, else `[batch, 1, 1]`.
        new: slots of the rows' own tokens.
        attention: of a decoded token, over all the memory that these slots lie in, where it is prepared.
    """

    query: Tensor
    keys: StoredRows
    values: StoredRows
    positions: Tensor
    row_positions: Tensor
    newest: int | Tensor
    new: slice | Tensor
    attention: PreparedAttention | None = None

    def block(self, first: int, last: int, end: int) -> Rows:
        """Rows `first … last - 1`, which see at most the first `end` slots."""
        if last - first == self.query.shape[2]:
            return self
        newest = self.row_positions[:, last - 1]
        return Rows(
            self.query[:, :, first:last],
            part(self.keys, _ALL, _ALL, slice(end)),
            part(self.values, _ALL, _ALL, slice(end)),
            self.positions[:, :, :end],
            self.row_positions[:, first:last],
            int(newest[0]) if isinstance(self.newest, int) else newest[:, None, None],
            self.new,
        )


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
        tokens = forward.placed
        rows = Rows(query, keys, values, table.positions, tokens.positions, tokens.newest, forward.new)
        padded = forward.visible is not None
        if forward.rows == 1 or not tokens.padded or self.policy is None or not self.policy.selects_for_prompts:
            return self._read(rows, padded, arguments)
        # a prompt is cut into blocks from its first real token on, so batch rows of unequal length are read one by one
        output = query.new_zeros(*query.shape[:3], values.shape[-1])
        last_read = []
        for row in range(query.shape[0]):
            real = tokens.positions[row] >= 0
            held = table.positions[row : row + 1]
            complete = bool((held >= 0).all(dim=1).eq((held >= 0).any(dim=1)).all())
            slots = (
                (held[0, 0] >= 0).nonzero().view(-1) if complete else torch.arange(keys.shape[2], device=keys.device)
            )
            alone = Rows(
                query[row : row + 1, :, real],
                keys[row : row + 1, :, slots],
                values[row : row + 1, :, slots],
                held[:, :, slots],
                tokens.positions[row : row + 1, real],
                tokens.seen[row] - 1,
                slice(0, 0),
            )
            if not tokens.counts[row]:
                last_read.append(held.new_full((1, 0), -1, dtype=torch.long))
                continue
            self.rearrange()  # the slots of this row alone
            output[row : row + 1, :, real] = self._read(alone, not complete, arguments)
            last_read.append(self.read_positions())
            self.rearrange()
        if any(item.dim() == 3 for item in last_read):
            last_read = [item if item.dim() == 3 else item[:, None].expand(-1, keys.shape[1], -1) for item in last_read]
        longest = max(item.shape[-1] for item in last_read)
        padding = [torch.nn.functional.pad(item, (0, longest - item.shape[-1]), value=-1) for item in last_read]
        self._last = (torch.cat(padding), longest, None)
        return output

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
        self._last = (table.columns[POSITION], count, index)
        if self.rotation is not None:
            if ordered and (index is None or (self.selector is not None and self.selector.complete_lists)):
                rotation = self.rotation.tables(query, count if index is None else index.shape[-1])
            if rotation is None:
                tokens = forward.placed
                rows = Rows(query, *table.views(), table.positions, tokens.positions, tokens.newest, forward.new)
                return self._attend_reindexed(rows, index, arguments)
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
            view = SlotView(
                query=block.query,
                keys=block.keys,
                positions=block.positions,
                newest=block.newest,
                scaling=arguments.scaling,
                ordered=ordered,
                ascending=isinstance(block.new, slice),
                decoding=not several,
                new=block.new,
                shared=self.shared,
                rotation=self.rotation,
                heads=self.heads,
            )
            index = None if self.selector is None else self.selector.select(view)
            outputs.append(self._attend(block, index, padded, ordered, arguments))
            self._last = (block.positions, block.positions.shape[2], index)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _attend(
        self, rows: Rows, index: Tensor | None, padded: bool, ordered: bool, arguments: AttentionArguments
    ) -> Tensor:
        """Rows over the slots of `index`."""
        if self.rotation is None:
            return _attend_kept(rows, index, padded, arguments)
        complete = index is None or (self.selector is not None and self.selector.complete_lists)
        if ordered and complete and rows.query.shape[2] == 1:
            entries = rows.keys.shape[2] if index is None else index.shape[-1]
            tables = self.rotation.tables(rows.query, entries)
            if tables is not None:
                return _attend_slots(rows, index, arguments, rotation=tables)
        return self._attend_reindexed(rows, index, arguments)

    def _make_room(self, table: SlotTable, keys: Any) -> None:
        """With offload: for what the selection will keep, before it exists."""
        if table.stowage is not None and self.selector is not None:
            more = self.selector.bytes_for(keys) - sum(tensor.nbytes for tensor in self.selector.tensors())
            table.stowage.make_room(more)

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
        tokens, padded, stored = forward.placed, forward.visible is not None, table.stowage.stored_slots(table)
        positions, newest = table.positions, tokens.newest
        ordered = not padded and isinstance(newest, int) and table.count == newest + 1
        self._make_room(table, stored)
        index = self.selector.select(
            SlotView(
                query=query,
                keys=stored,
                positions=positions,
                newest=newest,
                scaling=arguments.scaling,
                ordered=ordered,
                ascending=True,
                decoding=True,
                new=forward.new,
                shared=self.shared,
                rotation=self.rotation,
                heads=self.heads,
            )
        )
        self._last = (positions, table.count, index)
        if index is None:
            lists = 1 if self.shared else positions.shape[1]
            index = torch.arange(table.count, device=query.device).expand(positions.shape[0], lists, -1).contiguous()
        in_order = ordered and self.selector.complete_lists
        held = positions[:, : index.shape[1]]
        if padded:
            index = index.masked_fill(held.gather(-1, index.clamp(min=0)) < 0, -1)
        places, copies = stored.places(index)
        keys, values = stored.copies
        rows = Rows(query, keys, values, positions, tokens.positions, newest, forward.new, copies.attention)
        if self.rotation is None:
            return _attend_slots(rows, places, arguments)
        if in_order and (tables := self.rotation.tables(query, index.shape[-1])) is not None:
            return _attend_slots(rows, places, arguments, rotation=tables)
        rows.positions = held.gather(-1, copies.holder.clamp(min=0).long())  # of the copies
        return self._attend_reindexed(rows, places, arguments)

    def reset(self) -> None:
        """Forget what was read, and start the selection anew."""
        self._last = None
        if self.selector is not None:
            self.selector.rearrange()
            self.selector.hits = self.selector.misses = 0

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

    def _attend_reindexed(self, rows: Rows, index: Tensor | None, arguments: AttentionArguments) -> Tensor:
        """Keys rotated to 0 … n-1 in the order of their positions, rows to where their own tokens stand among them."""
        if self.rotation is None:
            raise RuntimeError("positions are not re-indexed here")
        keys, values, positions = rows.keys, rows.values, rows.positions
        if index is not None:
            keys, values, positions = _gathered(keys, values, positions, index)
        keys, values = unpacked(keys), unpacked(values)
        alike = positions[:, :1] if self.shared else positions
        ranks, tokens = token_ranks(alike)
        behind = rows.newest - rows.row_positions[:, None]  # rows are the last tokens: none between them is missing
        row_ranks = tokens - 1 - behind
        if row_ranks.shape[1] > 1:
            row_ranks = row_ranks.repeat_interleave(rows.query.shape[1] // row_ranks.shape[1], dim=1)
        output, _ = attend(
            self.rotation.rotate(rows.query, row_ranks.expand(rows.query.shape[0], -1, -1)),
            self.rotation.rotate(keys, ranks),
            values,
            positions=positions,
            query_positions=rows.row_positions if rows.query.shape[2] > 1 else None,
            scaling=arguments.scaling,
            softcap=arguments.softcap,
            sinks=arguments.sinks,
        )
        return output


def _gathered(
    keys: StoredRows, values: StoredRows, positions: Tensor, index: Tensor
) -> tuple[StoredRows, StoredRows, Tensor]:
    """As `select_slots`, in one copy of rows where one list serves all heads of one batch row."""
    if index.shape[:2] != (1, 1):
        return select_slots(
            cast(Tensor, keys), cast(Tensor, values), positions, index
        )  # it does no more than index them
    slot = index[0, 0].clamp(min=0)
    chosen = positions.index_select(2, slot).masked_fill(index < 0, -1)
    return keys.index_select(2, slot), values.index_select(2, slot), chosen


def _attend_slots(rows: Rows, index: Tensor | None, arguments: AttentionArguments, **options: Any) -> Tensor:
    """A single row over the slots of `index`.

    Args:
        options: `positions`, or the tables `rotation` by which keys and row are turned to their places in the list as they are read.
    """
    options |= {
        "index": index, "scaling": arguments.scaling, "softcap": arguments.softcap, "sinks": arguments.sinks
    }  # fmt: skip
    if rows.attention is not None:
        return rows.attention.attend(rows.query, rows.keys.shape[2], **options)[0]
    (keys, keys_scale), (values, values_scale) = parts(rows.keys), parts(rows.values)
    served = attend if options.get("rotation") is None else attend_turned
    return served(rows.query, keys, values, keys_scale=keys_scale, values_scale=values_scale, **options)[0]


def _attend_kept(rows: Rows, index: Tensor | None, padded: bool, arguments: AttentionArguments) -> Tensor:
    """Keys as the model rotated them."""
    several = rows.query.shape[2] > 1
    masked = padded or (index is not None and several)
    positions = rows.positions if masked else None
    if not several:
        return _attend_slots(rows, index, arguments, positions=positions)
    (keys, keys_scale), (values, values_scale) = parts(rows.keys), parts(rows.values)
    output, _ = attend(
        rows.query,
        keys,
        values,
        keys_scale=keys_scale,
        values_scale=values_scale,
        index=index,
        causal=not masked,
        positions=positions,
        query_positions=rows.row_positions if masked else None,
        scaling=arguments.scaling,
        softcap=arguments.softcap,
        sinks=arguments.sinks,
    )
    return output


def token_ranks(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each token among those of its head, by position, and their number: `[batch, heads, slots]` and `[batch, heads, 1]`.

    Empty slots (`-1`) get negative ranks.
    """
    empty = (positions < 0).sum(dim=-1, keepdim=True)
    ranks = positions.argsort(dim=-1, stable=True).argsort(dim=-1) - empty
    return ranks, positions.shape[-1] - empty
