"""SlotTable: the slots of one layer, every column of them in step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from kvpress.memory import allocate, filled, grown, growth, held_bytes, take
from kvpress.prepared import POSITION, PreparedSlots
from kvpress.ragged import RaggedRows
from kvpress.row_format import PackedRows, RowFormat

if TYPE_CHECKING:
    from kvpress.offload.stowage import Stowage

_NOTHING = torch.empty(0)


class SlotTable:
    """Keys, values, positions and a policy's columns of one layer, one slot per kept token and KV head.

    Three states:

    - *growing*: dense buffers `[batch, kv_heads, capacity, …]`, slots `0 … count - 1` in use, in ascending order of position with empty
      slots first; tokens are appended at `count`;
    - *steady*: all slots in use but one, `spare [batch, kv_heads, 1]`, which the next token overwrites. The order of slots carries no
      meaning. What the spare slot holds is the last evicted token, still readable until it is overwritten;
    - *steady and ragged*: as steady, with heads of unequal capacity. Keys and values are flat `[rows, dim]` (`RaggedRows`), the small
      columns stay `[batch, kv_heads, longest]` with `-1` positions past a head's capacity.

    An empty slot (padding, or never filled) has position `-1`. `held [batch, kv_heads]` counts the real tokens, on the host.

    With offload a `stowage` keeps keys and values between forwards: those of the first `base` slots of a growing table then lie elsewhere.

    Keys and values in the table's own buffers lie in the row format `form`. A first prompt's are the model's own tensors until the end of
    its forward, in the model's `dtype`.
    """

    stowage: Stowage | None = None
    base = 0

    def __init__(self, columns: tuple[str, ...] = (), form: RowFormat | None = None) -> None:
        self.column_names = columns
        self.form = form or RowFormat()
        self.dtype = torch.float32  # of keys and values as the model makes them
        self.dims = (0, 0)  # sizes of a key and a value
        self.keys = _NOTHING
        self.values = _NOTHING
        self.columns: dict[str, Tensor] = {}
        self.count = 0
        self.held = numpy.zeros((0, 0), dtype=numpy.int64)
        self.spare: Tensor | None = None
        self.rows: RaggedRows | None = None
        self.limit: int | None = None  # slots that this table will use at most, where that is known
        self._prepared: PreparedSlots | None = None
        self._owned = True  # not a model's own tensors, taken in for one forward
        self._complete = False  # known to have no empty slot; real tokens appended or exchanged do not change that

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether no token has come yet."""
        return not self.columns

    @property
    def positions(self) -> Tensor:
        """`[batch, kv_heads, slots in use]` int32."""
        return self._in_use(self.columns[POSITION])

    @property
    def policy_columns(self) -> dict[str, Tensor]:
        """The policy's columns, `[batch, kv_heads, slots in use]`."""
        return {name: self._in_use(self.columns[name]) for name in self.column_names}

    def _in_use(self, column: Tensor) -> Tensor:
        return column if column.shape[2] == self.count else column[:, :, : self.count]

    @property
    def has_empty(self) -> bool:
        """Whether a slot that attention reads is empty; asked between `place` and the end of a forward."""
        if not self._complete:
            limit = self.count if self.rows is None else self.rows.capacities
            self._complete = bool((self.held >= limit).all())
        return not self._complete

    def kept_positions(self) -> Tensor:
        """Positions of the kept tokens, ascending with `-1` last: `[batch, kv_heads, most tokens of a head]` int64."""
        if self.is_empty:
            return torch.empty(0, 0, 0, dtype=torch.long)
        kept = self.positions.long()
        if self.spare is not None:
            kept = kept.scatter(-1, self.spare, -1)
        last = torch.iinfo(torch.long).max
        kept = kept.masked_fill(kept < 0, last).sort(dim=-1).values
        kept = kept[..., : int(self.held.max(initial=0))]
        return kept.masked_fill(kept == last, -1)

    @property
    def packed(self) -> bool:
        """Whether keys and values lie in another form than the model's."""
        return self._owned and not self.form.plain

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, kv_heads, slots in use, dim]` in the model's type: views, or copies of ragged heads and packed rows."""
        keys, values = self.stored()
        if not self.packed:
            return keys, values
        return self.form.unpack(keys, self.dtype), self.form.unpack(values, self.dtype)

    def views(self) -> tuple[Tensor | PackedRows, Tensor | PackedRows]:
        """As `dense`, without a copy where rows are packed."""
        keys, values = self.stored()
        if not self.packed:
            return keys, values
        return PackedRows(keys, self.form, self.dtype), PackedRows(values, self.form, self.dtype)

    def stored(self) -> tuple[Tensor, Tensor]:
        """As `dense`, in the form in which they are stored."""
        if self.base and self.stowage is not None:
            return self.stowage.gathered(self)
        if self.rows is not None:
            return self.rows.padded(self.keys), self.rows.padded(self.values)
        if self.keys.shape[2] == self.count:
            return self.keys, self.values
        return self.keys[:, :, : self.count], self.values[:, :, : self.count]

    @property
    def has_layout(self) -> bool:
        """Whether keys and values must be read as `readable` says: heads are ragged, or rows packed."""
        return self.rows is not None or self.packed

    @property
    def prepared(self) -> PreparedSlots | None:
        """How decoded tokens are written and attended to, where keys and values lie in buffers that stay where they are."""
        if self._prepared is None and self._owned and (self.spare is not None or self.stowage is None):
            self._prepared = PreparedSlots(self)
        return self._prepared

    @property
    def steady(self) -> PreparedSlots:
        """As `prepared`, of a steady table."""
        prepared = self.prepared
        if prepared is None:
            raise RuntimeError("this table is not steady")
        return prepared

    def readable(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Keys and values of the slots in use as the kernels read them, and what they need to know for it: `starts` and `lengths` of flat
        rows `[rows, dim]` where heads are ragged, scales of int8 rows."""
        if self.spare is not None:
            return self.steady.whole
        keys, values = self.stored()
        return self.form.readable(keys, values, {}) if self.packed else (keys, values, {})

    def _kv_bytes(self, form: RowFormat) -> int:
        if self.is_empty:
            return 0
        batch, kv_heads = self.columns[POSITION].shape[:2]
        return batch * kv_heads * sum(form.row_bytes(dim, self.dtype) for dim in self.dims)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token of every KV head and batch row."""
        return self._kv_bytes(self.form)

    @property
    def full_bytes_per_token(self) -> int:
        """As `kv_bytes_per_token`, in the model's own type."""
        return self._kv_bytes(RowFormat())

    @property
    def bytes_per_token(self) -> int:
        """As `kv_bytes_per_token`, with the columns."""
        batch, kv_heads = self.columns[POSITION].shape[:2]
        return self.kv_bytes_per_token + batch * kv_heads * sum(
            column.element_size() for column in self.columns.values()
        )

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not depend on the number of tokens: which slot of each head is spare, where its rows begin, and how many."""
        batch, kv_heads = self.columns[POSITION].shape[:2]
        return 4 * batch * kv_heads * torch.long.itemsize

    def tensors(self) -> Iterator[Tensor | None]:
        """Every tensor held."""
        yield from (self.keys, self.values, self.spare, *self.columns.values())
        if self._prepared is not None:
            yield from self._prepared.tensors()
        if self.rows is not None:
            yield from (self.rows.starts, self.rows.lengths, self.rows.outside)

    @property
    def nbytes(self) -> int:
        """Bytes of all storages held."""
        return held_bytes(self.tensors())

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor) -> slice | Tensor:
        """Add tokens `[batch, kv_heads, tokens, dim]`; their positions come with `place`.

        Returns the new slots: a slice, or the overwritten ones `[batch, kv_heads, 1]`.
        """
        tokens = keys.shape[2]
        if self.is_empty:
            return self._adopt(keys, values)
        if self.stowage is not None:
            self.stowage.fetch(self, tokens)
        if self.spare is not None and tokens == 1:
            self.steady.overwrite(self.spare, keys, values)
            return self.spare
        if self.spare is not None:
            self._resume_growing(self.spare, room=tokens)
        first = self.count
        self._reserve(first + tokens)
        self.count += tokens
        new = slice(first, self.count)
        if tokens == 1 and keys.dtype == self.dtype and (prepared := self.prepared) is not None:
            prepared.overwrite(first, keys, values)
            return new
        place = slice(first - self.base, first - self.base + tokens)
        self.keys[:, :, place], self.values[:, :, place] = self.form.pack(keys), self.form.pack(values)
        for column in self.columns.values():
            column[:, :, new] = 0
        return new

    def place(self, new: slice | Tensor, positions: Tensor, counts: tuple[int, ...]) -> None:
        """Write the positions of appended tokens.

        Args:
            new: what `append` returned.
            positions: `[batch or 1, tokens]` int32, `-1` for padding.
            counts: real tokens among them, for each batch row.
        """
        if isinstance(new, Tensor):
            self.steady.place(new, positions)
        elif positions.shape[1] == 1 and self._prepared is not None:
            self._prepared.place(new.start, positions)
        else:
            self.columns[POSITION][:, :, new] = positions[:, None]
        if min(counts) == max(counts):
            self.held += counts[0]
        else:
            self.held += numpy.array(counts, dtype=numpy.int64)[:, None]
        if min(counts) < positions.shape[-1]:
            self._complete = False

    def write_keys(self, new: slice | Tensor, keys: Tensor) -> None:
        """Put `keys [batch, kv_heads, tokens, dim]` in the place of those just appended."""
        if isinstance(new, Tensor):
            self.steady.write_keys(new, keys)
        elif keys.shape[2] == 1 and self._prepared is not None:
            self._prepared.write_keys(new.start, keys)
        elif self._owned:
            self.keys[:, :, new.start - self.base : new.stop - self.base] = self.form.pack(keys)
        else:
            self.keys = keys  # the model's own tensor is left as it is

    def place_of_key(self, new: slice | Tensor) -> tuple[Tensor, int] | tuple[None, int]:
        """Where the key of a token lies that was just appended, as it came: keys of all slots `[batch, kv_heads, room, dim]` and its slot;
        `None` where it lies in another form, or heads have it in slots of their own."""
        if self._prepared is None or not self.form.plain or isinstance(new, Tensor) or new.stop - new.start > 1:
            return None, 0
        return self.keys, new.start

    def settle(self) -> None:
        """Keep everything: tensors taken in from the model are copied into own buffers (by the stowage, if there is one)."""
        if self.stowage is None:
            self.take_over()

    def take_over(self) -> None:
        """Copy tensors taken in from the model into own buffers."""
        if not self._owned:
            self._reserve(self._grown_capacity(self.count))

    @property
    def owned(self) -> bool:
        """Whether keys and values lie in buffers of this table, not in the model's own tensors."""
        return self._owned

    @property
    def capacity(self) -> int:
        """Slots that the buffers of a dense table have, those of `base` included."""
        return self.base + self.keys.shape[2]

    def capacity_for(self, slots: int) -> int:
        """Slots that the buffers will have when `slots` are in use."""
        return self.capacity if self._owned and self.capacity >= slots else self._grown_capacity(slots)

    def lie(self, keys: Tensor, values: Tensor, base: int) -> None:
        """From now on slots from `base` on lie at the beginning of these buffers, earlier ones elsewhere."""
        self.keys, self.values, self.base, self._owned = keys, values, base, True
        self._prepared = None

    def keep(self, index: Tensor, counts: numpy.ndarray, room: int) -> None:
        """Drop all but the slots `index [batch, kv_heads, n]`, in that order, and free the memory of the rest.

        Args:
            index: slots to keep; of head `[b, h]` the last `counts[b, h]` of them, the others become empty.
            counts: `[batch, kv_heads]` tokens that each head keeps, at most `n`.
            room: spare slots for coming tokens; with 1 the table is steady from now on.
        """
        keys, values = self.stored()
        batch, kv_heads, kept = index.shape
        surplus = None
        if counts.min() < kept:
            empty = torch.from_numpy(kept - counts).to(keys.device)[..., None]
            surplus = torch.arange(kept, device=keys.device) < empty
        self.held, self._complete = counts.astype(numpy.int64), False
        self.keys = take(keys, index, kept + room, self._pack)
        self.values = take(values, index, kept + room, self._pack)
        for name, column in self.columns.items():
            nothing = -1 if name == POSITION else 0
            fresh = filled((batch, kv_heads, kept + room), nothing, column, column.dtype)
            taken = column[:, :, : self.count].gather(-1, index)
            fresh[:, :, :kept] = taken if surplus is None else taken.masked_fill(surplus, nothing)
            self.columns[name] = fresh
        self.rows, self._prepared, self._owned = None, None, True
        self.spare = filled((batch, kv_heads, 1), kept, keys, torch.long) if room == 1 else None
        self.count = kept + 1 if room == 1 else kept

    def vacate(self, kept: Tensor, counts: numpy.ndarray) -> None:
        """Empty all slots of a steady table but those in `kept [batch, kv_heads, slots]` bool, `counts` of each head."""
        column = self.columns[POSITION]
        column[:, :, : self.count] = self.positions.masked_fill(~kept, -1)
        self.held, self._complete = counts.astype(numpy.int64), False
        self.spare = self.empty_slot()

    def empty_slot(self) -> Tensor:
        """Of each head a slot that is empty, if one is: `[batch, kv_heads, 1]`."""
        positions = self.positions
        if self.rows is not None:
            positions = positions.masked_fill(self.rows.outside, torch.iinfo(positions.dtype).max)
        return positions.argmin(dim=-1, keepdim=True)

    def retire(self, slot: Tensor) -> None:
        """Evict one token per head: `slot [batch, kv_heads, 1]` becomes the spare one."""
        self.spare = slot
        if self.has_empty:
            limit = self.count - 1 if self.rows is None else self.rows.capacities - 1
            self.held = numpy.minimum(self.held, limit)
        else:
            self.held -= 1

    def drop_last(self, tokens: int) -> None:
        """Undo the last `tokens` appended tokens; only before anything was evicted after them.

        Raises:
            RuntimeError: more tokens than can be undone exactly.
        """
        if tokens == 0:
            return
        if self.spare is not None:
            if tokens != 1:
                raise RuntimeError(f"cannot take back {tokens} tokens from a cache that has evicted since")
            self.held = self.held - 1
            return
        if tokens > self.count:
            raise RuntimeError(f"cannot take back {tokens} tokens, the cache holds {self.count}")
        dropped = self.columns[POSITION][:, :, self.count - tokens : self.count] >= 0
        self.held = self.held - dropped.sum(dim=-1).cpu().numpy()
        self.count -= tokens
        if self.stowage is not None:
            self.stowage.cut(self)

    def select_batch(self, index: Tensor) -> None:
        """Row `i` becomes what row `index[i]` was, in every column."""
        if self.is_empty:
            return
        index = index.to(self.keys.device)
        rows = index.tolist()
        with torch.inference_mode(False), torch.no_grad():
            self._select_batch(index, rows)
            if self.stowage is not None:
                self.stowage.select_batch(self, rows)

    def _select_batch(self, index: Tensor, rows: list[int]) -> None:
        if self.rows is not None:
            self.rows, order = self.rows.select_batch(rows, self.keys.device)
            self.keys, self.values = self.keys[order], self.values[order]
            self.count = int(self.rows.capacities.max())  # the longest head may not be among the rows taken
        else:
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        length = None if self.rows is None else self.count
        self.columns = {name: column[..., :length].index_select(0, index) for name, column in self.columns.items()}
        self.spare = None if self.spare is None else self.spare.index_select(0, index)
        self.held = self.held[rows]
        self._prepared = None

    def state(self) -> dict[str, Any]:
        """Everything from which `load_state` makes an equal table."""
        capacities = None if self.rows is None else self.rows.capacities
        keys, values = self.stored() if self.base else (self.keys, self.values)
        return {
            "keys": keys,
            "values": values,
            "dtype": self.dtype,
            "dims": self.dims,
            "spare": self.spare,
            "columns": dict(self.columns),
            "count": self.count,
            "held": self.held,
            "capacities": capacities,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`.

        Raises:
            ValueError: columns that are not this table's.
        """
        if sorted(state["columns"]) != sorted((POSITION, *self.column_names)):
            raise ValueError(
                f"columns must be {sorted((POSITION, *self.column_names))}, got {sorted(state['columns'])}"
            )
        self.keys, self.values, self.spare = state["keys"], state["values"], state["spare"]
        self.columns, self.count, self.held = state["columns"], state["count"], state["held"]
        self.dtype, self.dims = state["dtype"], state["dims"]
        capacities = state["capacities"]
        self.rows = None if capacities is None else RaggedRows(capacities, self.keys.device)
        self._owned, self._prepared, self._complete = True, None, False

    # -- inside --------------------------------------------------------------------------------------------------------

    def _adopt(self, keys: Tensor, values: Tensor) -> slice:
        """The first tokens: the model's own tensors serve until the end of the forward, nothing is copied."""
        batch, kv_heads, tokens, _ = keys.shape
        self.dtype, self.dims = keys.dtype, (keys.shape[-1], values.shape[-1])
        self.keys, self.values, self._owned, self._complete = keys, values, False, False
        self.count = tokens
        self.held = numpy.zeros((batch, kv_heads), dtype=numpy.int64)
        shape = (batch, kv_heads, tokens)
        self.columns = {name: filled(shape, 0, keys, torch.float32) for name in self.column_names}
        self.columns[POSITION] = filled(shape, -1, keys, torch.int32)
        return slice(0, tokens)

    def _resume_growing(self, spare: Tensor, room: int) -> None:
        """From steady to growing: slots sorted by position, the spare one gone, `room` slots for coming tokens."""
        keys, values = self.stored()
        positions = self.positions.scatter(-1, spare, -1)
        kept = int(self.held.max(initial=0))
        order = positions.argsort(dim=-1, stable=True)[..., self.count - kept :]
        self.columns[POSITION] = self.columns[POSITION].scatter(-1, spare, -1)
        self.keys, self.values = take(keys, order, kept + room), take(values, order, kept + room)
        for name, column in self.columns.items():
            fresh = filled((*column.shape[:2], kept + room), 0, column, column.dtype)
            fresh[:, :, :kept] = column[:, :, : self.count].gather(-1, order)
            self.columns[name] = fresh
        self.count, self.spare, self.rows, self._prepared, self._complete = kept, None, None, None, False

    def _reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots, with some to spare."""
        roomy = self._grown_capacity(capacity) if self._owned else capacity
        if not self._owned or self.capacity < capacity:
            held = self.count - self.base
            self.keys = grown(self._pack(self.keys), held, roomy - self.base)
            self.values = grown(self._pack(self.values), held, roomy - self.base)
            self._prepared = None
        if not self._owned or self.columns[POSITION].shape[2] < capacity:
            self.columns = {name: grown(column, self.count, roomy) for name, column in self.columns.items()}
            self._prepared = None
        self._owned = True

    def _pack(self, rows: Tensor) -> Tensor:
        """Rows of this table as they are stored in buffers of its own."""
        return rows if self._owned else self.form.pack(rows)

    def _grown_capacity(self, capacity: int) -> int:
        """`capacity` and some spare room, but no slot that would never be filled."""
        roomy = capacity + growth(capacity)
        return roomy if self.limit is None or self.limit < capacity else min(roomy, self.limit)

    def keep_ragged(self, index: Tensor, counts: numpy.ndarray, capacities: numpy.ndarray) -> None:
        """As `keep`, into heads of unequal size: `capacities [batch, kv_heads]` slots, spare ones included."""
        keys, values = self.stored()
        rows = RaggedRows(capacities, keys.device)
        longest = int(rows.capacities.max())
        batch, kv_heads, listed = index.shape
        taken = torch.from_numpy(counts).to(keys.device)[..., None]
        slot = torch.arange(longest, device=keys.device).expand(batch, kv_heads, longest)
        source = index.gather(-1, (slot + listed - taken).clamp(max=listed - 1))  # the last of index[b, h]
        self.keys, self.values = rows.flattened(keys, source, self._pack), rows.flattened(values, source, self._pack)
        for name, column in self.columns.items():
            fresh = allocate((batch, kv_heads, longest), column)
            kept = column[:, :, : self.count].gather(-1, source)
            fresh.copy_(kept.masked_fill(slot >= taken, -1 if name == POSITION else 0))
            self.columns[name] = fresh
        self.held, self._complete = counts.astype(numpy.int64), False
        self.spare = taken
        self.rows, self.count, self._owned = rows, longest, True
        self._prepared = None
