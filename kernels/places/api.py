"""Places and rows: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.dispatch import choose
from kvpress.kernels.places import native, reference


def find_places(
    index: Tensor,
    place: Tensor,
    holder: Tensor,
    uses: Tensor,
    *,
    tail: int = 0,
    base: int = 0,
    vacant: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Places of slots among rows. Slots that lie in none get the rows least used lately, of equal ones the first, in order.

    Args:
        index: `[batch, lists, n]` int64 slots, `-1` for none; a slot listed twice has one place.
        place: `[batch, lists, slots]` int32, in which row each slot lies, `-1` for none. It is updated, as the next two are.
        holder: `[batch, lists, rows]` int32, which slot lies in each row, `-1` for none.
        uses: `[batch, lists, rows]` int32, how much each row was used lately: at every call at which slots of its list lie in no row it
            loses an eighth, and 2²⁴ are added for one in `index`.
        tail: rows at the beginning in which the slots from `base` on lie, in order; no other slot gets them, and what lay there is gone.
        base: the slot in the first of these.
        vacant: rows behind these that are kept empty for slots to come.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[batch, lists, n]` int64 places, `-1` for none; and `[missing]` int64: the entries of the flat `index`, ascending, whose
        slots lay in no row.

    Raises:
        ValueError: shapes or types that do not fit, more slots than rows behind the tail's, an unknown `impl`, or an explicit one that
            cannot serve.
        IndexError: a slot beyond those of `place`.
    """
    state = (place, holder, uses)
    if index.dim() != 3 or any(each.dim() != 3 or each.shape[:2] != index.shape[:2] for each in state):
        raise ValueError(
            f"index, place, holder and uses must be [batch, lists, …], got {[tuple(each.shape) for each in (index, *state)]}"
        )
    if index.dtype != torch.int64 or any(each.dtype != torch.int32 for each in state):
        raise ValueError(
            f"index must be int64, place, holder and uses int32, got {[each.dtype for each in (index, *state)]}"
        )
    if min(tail, base, vacant) < 0:
        raise ValueError(f"tail, base and vacant must be at least 0, got {tail}, {base} and {vacant}")
    if holder.shape != uses.shape or index.shape[-1] + tail + vacant > holder.shape[-1]:
        raise ValueError(
            f"holder and uses must have {tail} + {vacant} rows for the tail and one for each of {index.shape[-1]} slots, got "
            f"{holder.shape[-1]} and {uses.shape[-1]}"
        )
    chosen = choose(
        "places of near copies", impl, {"native": lambda: native.refusal(index, *state), "reference": lambda: None}
    )
    return (native if chosen == "native" else reference).find_places(index, place, holder, uses, tail, base, vacant)


def rows_to_read(
    entries: Tensor,
    index: Tensor,
    places: Tensor,
    *,
    rows: int,
    block: int,
    blocks: int,
    then: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where slots lie that are to be read, block by block, in the order in which they lie there.

    Args:
        entries: `[missing]` int64, those of the flat `index` and of `places` that are wanted, as `find_places` names them.
        index: `[batch, lists, n]` int64 slots. Consecutive ones lie in a block, which has a row for each `[batch row, list, slot]`.
        places: `[batch, lists, n]` int64, where they go.
        rows: places of a list; those of all lists are counted through.
        block: slots of a block.
        blocks: how many there are.
        then: `[blocks, batch]` int64, which batch row of a block each batch row was when it was written. None: the same.
        impl: `"auto"` or the name of an implementation.

    Returns:
        Four of int64: the blocks, ascending; `[blocks + 1]` which of the following are each block's own; `[missing]` the numbers of rows
        in their block, ascending for each; and `[missing]` their places.

    Raises:
        ValueError: shapes or types that do not fit, an unknown `impl`, or an explicit one that cannot serve.
        IndexError: an entry that does not exist, or one that is no slot of these blocks.
    """
    given = [entries, index, places, *([] if then is None else [then])]
    if index.dim() != 3 or places.shape != index.shape or entries.dim() != 1:
        raise ValueError(
            f"index and places must be [batch, lists, n] and entries [missing], got {[tuple(each.shape) for each in given]}"
        )
    if any(each.dtype != torch.int64 for each in given):
        raise ValueError(f"entries, index, places and then must be int64, got {[each.dtype for each in given]}")
    if then is not None and then.shape != (blocks, index.shape[0]):
        raise ValueError(f"then must be [{blocks}, {index.shape[0]}] for blocks and batch, got {tuple(then.shape)}")
    if block < 1 or blocks < 1:
        raise ValueError(f"block and blocks must be at least 1, got {block} and {blocks}")
    chosen = choose("rows to read", impl, {"native": lambda: native.refusal(*given), "reference": lambda: None})
    return (native if chosen == "native" else reference).rows_to_read(entries, index, places, rows, block, blocks, then)
