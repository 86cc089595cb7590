"""SlotTable: the slots of one layer: which token each holds, and every column of them in step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from kvpress.columns import POSITION, Columns
from kvpress.key_values import KeyValues
from kvpress.memory import filled, held_bytes
from kvpress.prepared import PreparedSlots
from kvpress.ragged import RaggedRows
from kvpress.row_format import RowFormat

_FACTS = ("dtype", "dims", "spare", "count", "held")


class SlotTable(KeyValues):
    """Keys, values, positions and a policy's columns of one layer, one slot per kept token and KV head.

    Three states:

    - *growing*: dense buffers `[batch, kv_heads, capacity, …]`, slots `0 … count - 1` in use, in ascending order of position with empty
      slots first; tokens are appended at `count`;
    - *steady*: all slots in use but one, `spare [batch, kv_heads, 1]`, which the next token overwrites. The order of slots carries no
      meaning. What the spare slot holds is the last evicted token, still readable until it is overwritten;
    - *steady and ragged*: as steady, with heads of unequal capacity. Keys and values are flat, the small columns stay
      `[batch, kv_heads, longest]` with `-1` positions past a head's capacity.

    An empty slot (padding, or never filled) has position `-1`. `held [batch, kv_heads]` counts the real tokens, on the host.

    With offload the `stowage` keeps keys and values between forwards: those of the first `base` slots of a growing table.
    """

    def __init__(self, columns: tuple[str, ...] = (), form: RowFormat | None = None) -> None:
        super().__init__(form)
        self.column_names = columns
        self.columns = Columns()
        self.held = numpy.zeros((0, 0), dtype=numpy.int64)
        self.spare: Tensor | None = None
        self._prepared: PreparedSlots | None = None
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

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token of every KV head and batch row."""
        return self.held.size * sum(self.form.row_bytes(dim, self.dtype) for dim in self.dims)

    @property
    def full_bytes_per_token(self) -> int:
        """As `kv_bytes_per_token`, in the model's own type."""
        return self.held.size * sum(self.dims) * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        """As `kv_bytes_per_token`, with the columns of heads that hold tokens of their own."""
        return self.kv_bytes_per_token + self.held.size * sum(column.element_size() for column in self.columns.values())

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of every KV head and batch row as it is stored now: less than a token's where heads share positions."""
        return self.kv_bytes_per_token + self.columns.slot_bytes

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not depend on the number of tokens: which slot of each head is spare, where its rows begin, and how many."""
        return 4 * self.held.size * torch.long.itemsize

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
            return self._begin(keys, values)
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
        self._write(new, keys, values)
        self.columns.start(new)
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
            self.columns.stored(POSITION)[:, :, new] = positions[:, None]
        if min(counts) == max(counts):
            self.held += counts[0]
        else:
            self.held += numpy.array(counts, dtype=numpy.int64)[:, None]
        if min(counts) < positions.shape[-1]:
            self._complete = False

    def advance(self) -> None:
        """A token was put behind the others, and its position was there before."""
        self.count += 1
        self.held += 1

    def write_keys(self, new: slice | Tensor, keys: Tensor) -> None:
        """Put `keys [batch, kv_heads, tokens, dim]` in the place of those just appended."""
        if isinstance(new, Tensor):
            self.steady.write_keys(new, keys)
        elif keys.shape[2] == 1 and self._prepared is not None:
            self._prepared.write_keys(new.start, keys)
        elif self._owned:
            self._write_keys(new, keys)
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
            self._reserve(self._roomy(self.count))

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
        kept = index.shape[2]
        self._compact(index, counts, kept + room)
        if room == 1:
            self.spare = filled((*index.shape[:2], 1), kept, self.keys, torch.long)
            self.count = kept + 1

    def keep_ragged(self, index: Tensor, counts: numpy.ndarray, capacities: numpy.ndarray) -> None:
        """As `keep`, into heads of unequal size: `capacities [batch, kv_heads]` slots, spare ones included."""
        rows = RaggedRows(capacities, self.keys.device)
        longest, listed = int(rows.capacities.max()), index.shape[2]
        taken = torch.from_numpy(counts).to(self.keys.device)[..., None]
        slot = torch.arange(longest, device=self.keys.device).expand(*counts.shape, longest)
        source = index.gather(-1, (slot + listed - taken).clamp(max=listed - 1))  # the last of index[b, h]
        self._take_ragged(source, rows)
        self.columns = self.columns.taken(source, slot >= taken, longest)
        self._hold(counts, longest, spare=taken)

    def vacate(self, kept: Tensor, counts: numpy.ndarray) -> None:
        """Empty all slots of a steady table but those in `kept [batch, kv_heads, slots]` bool, `counts` of each head."""
        column = self.columns.stored(POSITION)
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
        self._select(index, rows)
        length = None if self.rows is None else self.count
        self.columns = self.columns.select_batch(index, length)
        self.spare = None if self.spare is None else self.spare.index_select(0, index)
        self.held = self.held[rows]
        self._prepared = None
        if self.stowage is not None:
            self.stowage.select_batch(self, rows)

    def state(self) -> dict[str, Any]:
        """Everything from which `load_state` makes an equal table."""
        keys, values = self.stored() if self.base else (self.keys, self.values)
        return {name: getattr(self, name) for name in _FACTS} | {
            "keys": keys,
            "values": values,
            "columns": dict(self.columns),
            "capacities": None if self.rows is None else self.rows.capacities,
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
        for name in ("keys", "values", *_FACTS):
            setattr(self, name, state[name])
        capacities = state["capacities"]
        growing = self.spare is None and capacities is None
        self.columns = Columns.loaded(state["columns"], self.held.shape[1], growing)
        self.rows = None if capacities is None else RaggedRows(capacities, self.keys.device)
        self._owned, self._prepared, self._complete = True, None, False

    # -- inside --------------------------------------------------------------------------------------------------------

    def _begin(self, keys: Tensor, values: Tensor) -> slice:
        """The first tokens."""
        self._adopt(keys, values)
        self.columns = Columns.empty(self.column_names, (*keys.shape[:2], self.count), keys)
        self.held, self._complete = numpy.zeros(keys.shape[:2], dtype=numpy.int64), False
        return slice(0, self.count)

    def _resume_growing(self, spare: Tensor, room: int) -> None:
        """From steady to growing: slots sorted by position, the spare one gone, `room` slots for coming tokens."""
        positions = self.positions.scatter(-1, spare, -1)
        kept = int(self.held.max(initial=0))
        order = positions.argsort(dim=-1, stable=True)[..., self.count - kept :]
        self._compact(order, self.held, kept + room)

    def _compact(self, index: Tensor, counts: numpy.ndarray, capacity: int) -> None:
        """As `keep`, in a table that grows, of `capacity` slots."""
        kept, surplus = index.shape[2], None
        if counts.min() < kept:
            empty = torch.from_numpy(kept - counts).to(index.device)[..., None]
            surplus = torch.arange(kept, device=index.device) < empty
        self._take(index, capacity)
        self.columns = self.columns.taken(index, surplus, capacity)
        self._hold(counts, kept, spare=None)

    def _hold(self, counts: numpy.ndarray, slots: int, spare: Tensor | None) -> None:
        """Other slots are in use from now on."""
        self.held, self.count, self.spare = counts.astype(numpy.int64), slots, spare
        self._prepared, self._complete = None, False

    def _reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots, with some to spare."""
        roomy = self._roomy(capacity) if self._owned else capacity
        if not self._owned or self.capacity < capacity:
            self._grow(roomy)
            self._prepared = None
        if not self._owned or self.columns[POSITION].shape[2] < capacity:
            self.columns = self.columns.grown(self.count, roomy)
            self._prepared = None
        self._owned = True
