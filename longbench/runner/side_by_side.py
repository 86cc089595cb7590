"""Decoding with the caches of many methods at once: they are the rows of one batch.

The weights of the model are read once for a token of all methods, which is where the time of decoding on a CPU goes. Attention,
observation and eviction stay each cache's own. A product of matrices of many rows may round otherwise than that of one row, so
logits are equal up to rounding, not bit for bit.
"""

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvpress import PolicyCache
from kvpress.cache_argument import passed
from kvpress.errors import CacheStateError
from kvpress.forward import Forward, hand_over
from kvpress.layer import PolicyLayer
from kvpress.masks import LogicalLength
from kvpress.observation import AttentionArguments
from kvpress.tokens import Tokens

from .clock import now


def can_stand_side_by_side(cache: Cache) -> bool:
    """Whether `cache` can be a row: every layer is compressed and stays in memory, the model attends to what is cached as it is, and the
    policy does not read the ids of the batch's tokens."""
    return (
        isinstance(cache, PolicyCache)
        and cache.tiers is None
        and not cache.policies.eviction.needs_token_ids
        and all(isinstance(layer, PolicyLayer) and not layer.expands_keys for layer in cache.layers)
    )


class SideBySide(Cache):
    """Caches of one sequence each, all of one length, as the rows of a batch.

    Args:
        caches: of one model; they stay usable on their own.

    Raises:
        ValueError: a cache that cannot be a row, or caches that have seen different numbers of tokens.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        for cache in caches:
            if not can_stand_side_by_side(cache):
                raise ValueError(f"caches must be PolicyCaches that can be rows of a batch, got {cache!r}")
        lengths = {cache.get_seq_length() for cache in caches}
        if len(lengths) != 1:
            raise ValueError(f"caches must have seen equally many tokens, got {sorted(lengths)}")
        columns = zip(*(cast(PolicyCache, cache).policy_layers for cache in caches), strict=True)
        super().__init__(layers=[_Rows(list(column)) for column in columns])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a row of keys and values `[rows, kv_heads, tokens, dim]` to each cache."""
        layer = cast(_Rows, self.layers[layer_idx])
        forward = layer.append(key_states, value_states)
        hand_over(forward, key_states)
        return key_states, value_states


class _Rows(CacheLayerMixin):
    """One layer of several caches, for our attention function."""

    is_sliding = False
    is_compileable = False

    def __init__(self, rows: list[PolicyLayer]) -> None:
        self.rows = rows
        self.layer_idx = rows[0].layer_idx
        self.is_initialized = True
        self._read: list[tuple[Tensor, Tensor]] = []

    @property
    def seen(self) -> int:
        """Tokens seen by every row."""
        return self.rows[0].seen

    @property
    def clock(self) -> Any:
        """Checks positions; rows are alike in them."""
        return self.rows[0].clock

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Only `SideBySide.update` can hand the rows over to attention."""
        raise CacheStateError("rows are appended through SideBySide.update")

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """In logical coordinates, as of the rows' own layers."""
        return LogicalLength(self.seen + query_length), 0

    def append(self, keys: Tensor, values: Tensor) -> Forward:
        """Give every row its tokens; returns the forward for the attention function."""
        if keys.shape[0] != len(self.rows):
            raise ValueError(f"batch must have one row for each of {len(self.rows)} caches, got {keys.shape[0]}")
        before = (self.seen,) * len(self.rows)
        pairs = zip(keys.split(1), values.split(1), strict=True)
        self._read = [row.update(key, value) for row, (key, value) in zip(self.rows, pairs, strict=True)]
        return Forward(weakref.ref(cast(PolicyLayer, self)), keys.shape[2], slice(0, 0), keys, before)

    def place(self, forward: Forward, mask: Tensor | None, device: torch.device, ids: Tensor | None = None) -> Tokens:
        """Positions of the tokens, alike in all rows."""
        if mask is not None:
            raise ValueError("attention_mask must be left out: rows side by side have no padding")
        for row in self.rows:
            forward.tokens = row.place(row.running, None, device, None if ids is None else ids[:1])
        return forward.placed

    def attend(
        self, forward: Forward, query: Tensor, keys: Tensor, values: Tensor, arguments: AttentionArguments
    ) -> Tensor:
        """Attention of every row over its own slots."""
        outputs = [
            row.attend(row.running, own, *read, arguments)
            for row, own, read in zip(self.rows, query.split(1), self._read, strict=True)
        ]
        return torch.cat(outputs)

    def prepare_step(self, *attended: object) -> None:
        """Rows go the ordinary way."""

    def finish(self, forward: Forward, query: Tensor, keys: Tensor, arguments: AttentionArguments) -> None:
        """Every row's policy observes and evicts."""
        for row, own, (read, _) in zip(self.rows, query.split(1), self._read, strict=True):
            row.finish(row.running, own, read, arguments)
        self._read = []


@torch.no_grad()
def decode_together(
    model: PreTrainedModel,
    caches: Sequence[Cache],
    fed: Sequence[Sequence[int]],
    *,
    limit: int,
    ends: Collection[int] = (),
    not_first: Collection[int] = (),
    on_end: Callable[[int, list[int], float, float], None],
) -> None:
    """Greedy continuation of every row, until one of `ends` or `limit` new tokens.

    Args:
        caches: one a row.
        fed: `[rows][tokens]` ids to feed first, equally many for each row.
        limit: new tokens of each row, at least 1.
        ends: token ids after which a row is complete.
        not_first: token ids that cannot be a row's first new token.
        on_end: told row, new tokens, and the row's part of the wall clock in seconds until its first token, and after it,
            when a row is complete; forwards are divided equally among their rows.
    """
    if not caches:
        return
    rows = list(range(len(caches)))
    new: list[list[int]] = [[] for _ in rows]
    seconds = [[0.0, 0.0] for _ in rows]
    batch = SideBySide(caches)
    feed = torch.tensor([list(ids) for ids in fed], device=model.device)
    while rows:
        start = now(model.device)
        logits = model(feed, **passed(model, batch), use_cache=True, logits_to_keep=1).logits[:, -1]
        if not new[rows[0]] and not_first:
            logits[:, list(not_first)] = -torch.inf
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        part = (now(model.device) - start) / len(rows)
        left = []
        for row, token in zip(rows, tokens, strict=True):
            seconds[row][min(len(new[row]), 1)] += part
            new[row].append(token)
            if token in ends or len(new[row]) == limit:
                on_end(row, new[row], *seconds[row])
            else:
                left.append(row)
        if left and left != rows:
            batch = SideBySide([caches[row] for row in left])
        rows = left
        feed = torch.tensor([new[row][-1:] for row in rows], device=model.device)
