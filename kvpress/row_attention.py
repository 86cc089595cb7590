"""Attention of query rows over listed slots: keys as the model rotated them, or rotated to re-indexed positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from kvpress.kernels.attention import attend
from kvpress.kernels.attention.turned import attend_turned
from kvpress.kernels.scores import select_slots
from kvpress.observation import AttentionArguments
from kvpress.rope import Rotation
from kvpress.row_format import Rows as StoredRows
from kvpress.row_format import part, parts, unpacked

if TYPE_CHECKING:
    from kvpress.kernels.attention.prepared import PreparedAttention

_ALL = slice(None)


@dataclass(slots=True)
class Rows:
    """Query rows and the slots before them.

    Attributes:
        query: `[batch, query_heads, rows, dim]`; before rotation where positions are re-indexed.
        keys, values: of the slots, `[batch, heads, slots, dim]`; keys likewise.
        held: positions `[batch, heads, slots]` of the slots, or of those that they are copies of.
        row_positions: `[batch or 1, rows]`.
        newest: position of the last row: an int where all batch rows are alike, else `[batch, 1, 1]`.
        new: slots of the rows' own tokens.
        attention: of a decoded token, over all the memory that these slots lie in, where it is prepared.
        copied: where these slots are copies, which one each is of, `[batch, heads, slots]`, `-1` for none.
    """

    query: Tensor
    keys: StoredRows
    values: StoredRows
    held: Tensor
    row_positions: Tensor
    newest: int | Tensor
    new: slice | Tensor
    attention: PreparedAttention | None = None
    copied: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """Of the slots, `[batch, heads, slots]`; looked up at every call where they are copies."""
        return self.held if self.copied is None else self.held.gather(-1, self.copied.clamp(min=0).long())

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


def attend_rows(
    rows: Rows,
    index: Tensor | None,
    arguments: AttentionArguments,
    *,
    padded: bool,
    rotation: Rotation | None,
    in_order: bool,
    shared: bool,
) -> Tensor:
    """Output `[batch, query_heads, rows, value_dim]` of rows over the slots `index [batch, heads or 1, n]`, `-1` for none; `None`: all.

    Args:
        padded: some of the slots may be empty.
        rotation: where positions are re-indexed.
        in_order: a single row's list ascends by position and has no `-1`.
        shared: all KV heads keep the same tokens.
    """
    if rotation is None:
        return _attend_kept(rows, index, arguments, padded)
    if in_order and rows.query.shape[2] == 1:
        entries = rows.keys.shape[2] if index is None else index.shape[-1]
        if (tables := rotation.tables(rows.query, entries)) is not None:
            return _attend_row(rows, index, arguments, rotation=tables)
    return attend_reindexed(rows, index, arguments, rotation, shared)


def attend_reindexed(
    rows: Rows, index: Tensor | None, arguments: AttentionArguments, rotation: Rotation, shared: bool
) -> Tensor:
    """As `attend_rows`, over copies: keys rotated to 0 … n-1 in the order of their positions, rows to where their own tokens stand
    among them."""
    keys, values, positions = rows.keys, rows.values, rows.positions
    if index is not None:
        keys, values, positions = _gathered(keys, values, positions, index)
    keys, values = unpacked(keys), unpacked(values)
    ranks, tokens = token_ranks(positions[:, :1] if shared else positions)
    behind = rows.newest - rows.row_positions[:, None]  # rows are the last tokens: none between them is missing
    row_ranks = tokens - 1 - behind
    if row_ranks.shape[1] > 1:
        row_ranks = row_ranks.repeat_interleave(rows.query.shape[1] // row_ranks.shape[1], dim=1)
    output, _ = attend(
        rotation.rotate(rows.query, row_ranks.expand(rows.query.shape[0], -1, -1)),
        rotation.rotate(keys, ranks),
        values,
        positions=positions,
        query_positions=rows.row_positions if rows.query.shape[2] > 1 else None,
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


def _attend_kept(rows: Rows, index: Tensor | None, arguments: AttentionArguments, padded: bool) -> Tensor:
    """Keys as the model rotated them."""
    several = rows.query.shape[2] > 1
    masked = padded or (index is not None and several)
    positions = rows.positions if masked else None
    if not several:
        return _attend_row(rows, index, arguments, positions=positions)
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


def _attend_row(rows: Rows, index: Tensor | None, arguments: AttentionArguments, **options: Any) -> Tensor:
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
