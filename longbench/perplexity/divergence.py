"""Scores of a continuation under several caches, in step with the full cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from ..runner.generation import cache_bytes, chunks_of
from ..runner.method import FULL, Method
from .windows import Window


@dataclass(frozen=True)
class TokenScores:
    """Per-token scores of one window under one method, each of shape [continuation], in nats and fp64.

    Attributes:
        nll: negative log-likelihood of the next token of the text.
        kl: KL(full cache || method) of the next-token distributions; 0 for the full cache itself.
        agreement: 1 where the method's most likely token is the full cache's.
        cache_bytes, full_bytes: held after the prefix has been read, by the method and by the full cache.
    """

    nll: torch.Tensor
    kl: torch.Tensor
    agreement: torch.Tensor
    cache_bytes: int
    full_bytes: int


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel,
    methods: Sequence[Method],
    window: Window,
    *,
    chunk_size: int = 1,
    prefill_chunk_size: int | None = None,
) -> dict[str, TokenScores]:
    """Read the prefix under every method, then the true continuation, `chunk_size` tokens a forward.

    The first next token is predicted by the prefix's own last forward, before anything was evicted where a policy
    evicts at the end of a forward; it is scored like the others. With `chunk_size` 1 the continuation is read as
    decoding reads it.

    Args:
        chunk_size: tokens of the continuation in one forward, at least 1.
        prefill_chunk_size: tokens of the prefix in one forward; None reads it in one.

    Returns:
        Scores by the methods' labels.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    full = _Reader(model, FULL, window, prefill_chunk_size)
    readers = {
        method.label: full if method == FULL else _Reader(model, method, window, prefill_chunk_size)
        for method in methods
    }
    sums: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {label: [] for label in readers}
    start = 0
    for targets in chunks_of(window.next_ids, chunk_size):
        # The last token of the continuation is only ever a target.
        expected = full.log_probabilities(start, len(targets))
        wanted = torch.tensor(targets, device=expected.device)
        for label, reader in readers.items():
            found = expected if reader is full else reader.log_probabilities(start, len(targets))
            nll = -found.gather(-1, wanted[:, None])[:, 0]
            # Terms of probability 0 add nothing; 0 * -inf would be NaN.
            terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - found))
            same = (found.argmax(-1) == expected.argmax(-1)).double()
            sums[label].append((nll.cpu(), terms.sum(-1).clamp_min(0).cpu(), same.cpu()))
        start += len(targets)
    return {label: _joined(sums[label], reader.held, full.held) for label, reader in readers.items()}


def _joined(parts: Sequence[tuple[torch.Tensor, ...]], held: int, full: int) -> TokenScores:
    nll, kl, agreement = (torch.cat(values) for values in zip(*parts, strict=True))
    return TokenScores(nll, kl, agreement, held, full)


class _Reader:
    """One cache that reads a window; keeps the distribution of the next token."""

    def __init__(self, model: PreTrainedModel, method: Method, window: Window, prefill_chunk_size: int | None) -> None:
        self._model = model
        self._window = window
        self._cache: Cache = method.make_cache(model)
        for chunk in chunks_of(window.prefix_ids, prefill_chunk_size):
            self._next = self._forward(chunk, keep=1)
        self.held = cache_bytes(self._cache)

    def log_probabilities(self, start: int, count: int) -> torch.Tensor:
        """Log-probabilities [count, vocabulary] of next tokens start to start + count, in fp64."""
        # Position i of the continuation is predicted by token i - 1: the prefix's last token for i = 0.
        if start == 0:
            rest = self._window.next_ids[: count - 1]
        else:
            rest = self._window.next_ids[start - 1 : start + count - 1]
        if not rest:
            return self._next
        logits = self._forward(rest, keep=len(rest))
        return torch.cat([self._next, logits]) if start == 0 else logits

    def _forward(self, ids: Sequence[int], keep: int) -> torch.Tensor:
        batch = torch.tensor([ids], device=self._model.device)
        output = self._model(batch, past_key_values=self._cache, use_cache=True, logits_to_keep=keep)
        logits: torch.Tensor = output.logits
        return logits[0, -keep:].double().log_softmax(-1)
