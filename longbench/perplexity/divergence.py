"""Scores of a continuation under several caches, in step with the full cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from transformers import Cache, PreTrainedModel

from kvpress.cache_argument import passed
from kvpress.profiling.cache_bytes import bytes_in_tiers

from ..runner.generation import cache_bytes, chunks_of
from ..runner.method import FULL, Method
from ..runner.shared_prefill import can_share, prefill_together
from ..runner.side_by_side import SideBySide, can_stand_side_by_side
from .windows import Window


@dataclass(frozen=True)
class TokenScores:
    """Per-token scores of one window under one method, each of shape [continuation], in nats and fp64.

    Attributes:
        nll: negative log-likelihood of the next token of the text.
        kl: KL(full cache || method) of the next-token distributions; 0 for the full cache itself.
        agreement: 1 where the method's most likely token is the full cache's.
        cache_bytes, full_bytes: held after the prefix has been read, by the method and by the full cache.
        tiers: bytes in each tier of the method's cache then, with offload.
    """

    nll: torch.Tensor
    kl: torch.Tensor
    agreement: torch.Tensor
    cache_bytes: int
    full_bytes: int
    tiers: Mapping[str, int] = field(default_factory=dict)


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel,
    methods: Sequence[Method],
    window: Window,
    *,
    chunk_size: int = 1,
    prefill_chunk_size: int | None = None,
    together: bool = False,
) -> dict[str, TokenScores]:
    """Read the prefix under every method, then the true continuation, `chunk_size` tokens a forward.

    The first next token is predicted by the prefix's own last forward, before anything was evicted where a policy
    evicts at the end of a forward; it is scored like the others. With `chunk_size` 1 the continuation is read as
    decoding reads it. A prefix of one forward is read once for all methods that can share that.

    Args:
        chunk_size: tokens of the continuation in one forward, at least 1.
        prefill_chunk_size: tokens of the prefix in one forward; None reads it in one.
        together: read the continuation with all methods as the rows of one batch, where they can be: faster, and equal up to
            rounding.

    Returns:
        Scores by the methods' labels.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    full = _Reader(model, {FULL.label: FULL.make_cache(model)}, window, prefill_chunk_size)
    readers = _readers(model, [method for method in methods if method != FULL], window, prefill_chunk_size, together)
    sums: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    start = 0
    for targets in chunks_of(window.next_ids, chunk_size):
        # The last token of the continuation is only ever a target.
        (expected,) = full.log_probabilities(start, len(targets)).values()
        wanted = torch.tensor(targets, device=expected.device)
        found = {FULL.label: expected} if FULL in methods else {}
        for reader in readers:
            found |= reader.log_probabilities(start, len(targets))
        for label, own in found.items():
            nll = -own.gather(-1, wanted[:, None])[:, 0]
            # Terms of probability 0 add nothing; 0 * -inf would be NaN.
            terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - own))
            same = (own.argmax(-1) == expected.argmax(-1)).double()
            sums.setdefault(label, []).append((nll.cpu(), terms.sum(-1).clamp_min(0).cpu(), same.cpu()))
        start += len(targets)
    held = dict(item for reader in (full, *readers) for item in reader.held.items())
    tiers = {label: found for reader in readers for label, found in reader.tiers.items()}
    full_bytes = held[FULL.label]
    return {
        method.label: _joined(sums[method.label], held[method.label], full_bytes, tiers.get(method.label, {}))
        for method in methods
    }


def _readers(
    model: PreTrainedModel, methods: Sequence[Method], window: Window, prefill_chunk_size: int | None, together: bool
) -> "list[_Reader]":
    caches = {method.label: method.make_cache(model) for method in methods}
    read: dict[str, torch.Tensor] = {}
    sharing = [label for label, cache in caches.items() if can_share(cache)]
    if sharing and prefill_chunk_size is None and len(window.prefix_ids) > 1:
        prefilled = prefill_together(model, [caches[label] for label in sharing], window.prefix_ids)
        read = dict.fromkeys(sharing, prefilled.logits)
    side_by_side = [label for label in read if together and can_stand_side_by_side(caches[label])]
    groups = [[label] for label in caches if label not in side_by_side] + ([side_by_side] if side_by_side else [])
    return [
        _Reader(model, {label: caches[label] for label in group}, window, prefill_chunk_size, read) for group in groups
    ]


def _joined(parts: Sequence[tuple[torch.Tensor, ...]], held: int, full: int, tiers: Mapping[str, int]) -> TokenScores:
    nll, kl, agreement = (torch.cat(values) for values in zip(*parts, strict=True))
    return TokenScores(nll, kl, agreement, held, full, tiers)


class _Reader:
    """Caches that read a window, as the rows of one batch; keeps the distribution of the next token.

    Args:
        caches: by label.
        read: logits of the next token, for caches that have read the prefix.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        caches: Mapping[str, Cache],
        window: Window,
        prefill_chunk_size: int | None,
        read: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self._model = model
        self._window = window
        self._labels = list(caches)
        if self._labels[0] in read:
            self._next = torch.stack([_normalised(read[label]) for label in caches])[:, None]
        self._cache = SideBySide(list(caches.values())) if len(caches) > 1 else next(iter(caches.values()))
        if self._labels[0] not in read:
            for chunk in chunks_of(window.prefix_ids, prefill_chunk_size):
                self._next = self._forward(chunk, keep=1)
        self.held = {label: cache_bytes(cache) for label, cache in caches.items()}
        self.tiers = {label: bytes_in_tiers(cache) for label, cache in caches.items()}

    def log_probabilities(self, start: int, count: int) -> dict[str, torch.Tensor]:
        """Log-probabilities [count, vocabulary] of next tokens start to start + count, in fp64, by label."""
        # Position i of the continuation is predicted by token i - 1: the prefix's last token for i = 0.
        if start == 0:
            rest = self._window.next_ids[: count - 1]
        else:
            rest = self._window.next_ids[start - 1 : start + count - 1]
        parts = [self._next] if start == 0 else []
        if rest:
            parts.append(self._forward(rest, keep=len(rest)))
        return dict(zip(self._labels, torch.cat(parts, dim=1), strict=True))

    def _forward(self, ids: Sequence[int], keep: int) -> torch.Tensor:
        batch = torch.tensor([ids] * len(self._labels), device=self._model.device)
        output = self._model(batch, **passed(self._model, self._cache), use_cache=True, logits_to_keep=keep)
        return _normalised(output.logits[:, -keep:])


def _normalised(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1)
