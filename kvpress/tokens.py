"""The tokens of one forward: where they stand in each row, and which are padding. Made once a forward, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpress.errors import CacheStateError


@dataclass(frozen=True)
class Tokens:
    """Tokens of one forward.

    Attributes:
        rows: how many, padding included.
        counts: how many are real, for each batch row.
        seen: real tokens of each batch row, these included.
        positions: `[batch, rows]` (or `[1, rows]` when all batch rows are alike) int32, `-1` for padding.
        newest: position of the last token: an int when all batch rows are alike, else `[batch, 1, 1]` int32.
    """

    rows: int
    counts: tuple[int, ...]
    seen: tuple[int, ...]
    positions: Tensor
    newest: int | Tensor

    @property
    def padded(self) -> bool:
        """Whether some of these tokens are padding."""
        return min(self.counts) < self.rows

    def to(self, device: torch.device) -> Tokens:
        """The same on another device."""
        newest = self.newest.to(device) if isinstance(self.newest, Tensor) else self.newest
        return replace(self, positions=self.positions.to(device), newest=newest)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A forward of one real token for each batch row, as the first layer found it.

    Attributes:
        mask, ids: the padding mask and position ids that the model gave it: who is given the same tensors need not look at them again.
        before: real tokens that each batch row had before.
        tokens: the new ones.
        rotated_to: where positions are re-indexed, those to which the model rotated.
    """

    mask: Tensor | None
    ids: Tensor | None
    before: tuple[int, ...]
    tokens: Tokens
    rotated_to: Tensor | None


class TokenClock:
    """Counts the tokens of each batch row, and hands the same `Tokens` to every layer of a forward: one a device.

    `decoded` is what the first layer found of a decoded token, `None` where that does not say it all.

    A model that lies on several devices gives every layer copies of its own of mask and position ids. What belongs to one forward is
    known by the first layer, which begins it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A forward begins, or ended in every layer: hold on to nothing."""
        self._key: tuple[object, ...] | None = None
        self._tokens: dict[torch.device, Tokens] = {}
        self._ids: dict[torch.device, Tensor] = {}
        self._checked = False
        self.decoded: Decoded | None = None

    def note(
        self,
        mask: Tensor | None,
        ids: Tensor | None,
        before: tuple[int, ...],
        tokens: Tokens,
        rotated_to: Tensor | None,
    ) -> None:
        """What the first layer found, for `decoded`."""
        if tokens.rows == 1 and not tokens.padded:
            self.decoded = Decoded(mask, ids, before, tokens, rotated_to)

    def read(self, before: tuple[int, ...], rows: int, mask: Tensor | None, device: torch.device) -> Tokens:
        """Tokens of a forward of `rows` tokens after `before` real ones.

        Args:
            before: real tokens seen by each batch row.
            rows: tokens of this forward, padding included.
            mask: `[batch, 1, 1, length]` bool, `False` for padding; its last `rows` entries belong to this forward. `None`: no padding.
            device: of the positions.
        """
        key = (before, rows, mask is None)
        if self._key != key:
            self.clear()
            self._key = key
        if device not in self._tokens:
            known = next(iter(self._tokens.values()), None)
            self._tokens[device] = _tokens(before, rows, mask, device) if known is None else known.to(device)
        return self._tokens[device]

    def same_ids(self, position_ids: Tensor) -> Tensor:
        """Of the copies of a forward's position ids on one device the first that came."""
        return self._ids.setdefault(position_ids.device, position_ids)

    def check_positions(self, tokens: Tokens, seen: int, position_ids: Tensor | None) -> None:
        """Raise `CacheStateError` when the model rotates the last of `tokens` to a position that does not continue this cache.

        Positions may count padding or not. One look per forward of several tokens.
        """
        if tokens.rows == 1 or self._checked or position_ids is None or position_ids.dim() != 2:
            return
        self._checked = True
        last = int(position_ids[0, -1])
        if last not in (tokens.seen[0] - 1, seen - 1):
            raise CacheStateError(
                f"position_ids must continue the {seen - tokens.rows} tokens seen and end at {tokens.seen[0] - 1}, they end at {last}: "
                "tokens were fed again, or the cache belongs to another text"
            )


def _tokens(before: tuple[int, ...], rows: int, mask: Tensor | None, device: torch.device) -> Tokens:
    counts = (rows,) * len(before)
    valid = None
    if mask is not None:
        valid = mask[:, 0, 0, -rows:].to(device)
        counts = tuple(valid.sum(dim=-1).tolist())
        if min(counts) == rows:
            valid = None
    seen = tuple(past + count for past, count in zip(before, counts, strict=True))
    if valid is None and len(set(before)) == 1:
        positions = torch.arange(before[0], before[0] + rows, dtype=torch.int32, device=device)[None]
        return Tokens(rows, counts, seen, positions, seen[0] - 1)
    start = torch.tensor(before, dtype=torch.int32, device=device)[:, None]
    if valid is None:
        positions = start + torch.arange(rows, dtype=torch.int32, device=device)
    else:
        positions = torch.where(valid, start + valid.int().cumsum(-1, dtype=torch.int32) - 1, -1)
    newest = torch.tensor(seen, dtype=torch.int32, device=device)[:, None, None] - 1
    return Tokens(rows, counts, seen, positions, newest)
