"""Answers under many methods at once: a prompt is read once for all that can share it."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..prompt import EncodedPrompt
from ..sample import Sample
from .clock import now
from .generation import Answer, ModelEngine
from .method import Method
from .shared_prefill import can_share, prefill_together
from .side_by_side import can_stand_side_by_side, decode_together


@dataclass(frozen=True)
class _Read:
    """A cache that has read a prompt: the logits `[vocabulary]` of the next token, and the seconds it took."""

    method: Method
    cache: Cache
    logits: Tensor
    seconds: float


class GroupEngine(ModelEngine):
    """Answers samples under several methods, whose caches are held at once.

    Args:
        model, tokenizer, query_aware, chunk_size: as of `ModelEngine`. With a chunk size nothing is shared: an evicted token is
            missing from the next chunk.
        together: decode methods side by side, as the rows of a batch: faster, and equal up to rounding. Else each method decodes
            alone, and its answer equals that of `answers` bit for bit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        query_aware: bool = False,
        chunk_size: int | None = None,
        together: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, query_aware=query_aware, chunk_size=chunk_size)
        self.together = together

    def answers_of(
        self, methods: Sequence[Method], batch: Sequence[tuple[Sample, EncodedPrompt]]
    ) -> Iterator[tuple[Method, Sample, Answer]]:
        """Answers of samples that share one context under every method: first those that share nothing, method by method."""
        agnostic = not self.query_aware and bool(batch[0][1].context_ids)
        shortest = min(len(prompt.context_ids) if agnostic else len(prompt) for _, prompt in batch)
        group = [] if self.chunk_size is not None or shortest < 2 else self._group(methods)
        for method in methods:
            if method not in group:
                for (sample, _), answer in zip(batch, self.answers(method, batch), strict=True):
                    yield method, sample, answer
        if not group:
            return
        answer_all = self._decode_together if self.together else self._decode_alone
        context = self._read(group, batch[0][1].context_ids) if agnostic else []
        for number, (sample, prompt) in enumerate(batch, start=1):
            read = context if agnostic else self._read(group, prompt.ids)
            if agnostic and number < len(batch):
                read = [replace(item, cache=copy.deepcopy(item.cache)) for item in context]
            for method, answer in answer_all(read, sample, prompt, agnostic):
                yield method, sample, answer

    def _group(self, methods: Sequence[Method]) -> list[Method]:
        fits = can_stand_side_by_side if self.together else can_share
        return [method for method in methods if fits(method.make_cache(self.model))]

    def _read(self, methods: Sequence[Method], ids: Sequence[int]) -> list[_Read]:
        """A cache of every method that has read `ids`; one forward for those that can share it."""
        caches = [method.make_cache(self.model) for method in methods]
        sharing = [cache for cache in caches if can_share(cache)]
        shared = prefill_together(self.model, sharing, ids) if sharing else None
        seconds = iter(shared.seconds if shared is not None else ())
        read = []
        for method, cache in zip(methods, caches, strict=True):
            if shared is not None and can_share(cache):
                read.append(_Read(method, cache, shared.logits, next(seconds)))
                continue
            start = now(self.model.device)
            logits = self.feed(cache, ids)
            read.append(_Read(method, cache, logits, now(self.model.device) - start))
        return read

    def _first(self, read: _Read, sample: Sample) -> int:
        """The first token of an answer, as `generate` chooses it."""
        logits = read.logits
        if sample.stop_at_newline:
            ends = torch.tensor(self.ends(sample), device=logits.device)
            logits = logits.index_fill(0, ends, -torch.inf)
        return int(logits.argmax())

    def _decode_alone(
        self, read: Sequence[_Read], sample: Sample, prompt: EncodedPrompt, agnostic: bool
    ) -> Iterator[tuple[Method, Answer]]:
        for item in read:
            first = None if agnostic else self._first(item, sample)
            yield item.method, self.generate(item.cache, sample, prompt, item.seconds, first)

    def _decode_together(
        self, read: Sequence[_Read], sample: Sample, prompt: EncodedPrompt, agnostic: bool
    ) -> Iterator[tuple[Method, Answer]]:
        read = list(read)
        answers: dict[int, Answer] = {}
        begun = [[] if agnostic else [self._first(item, sample)] for item in read]
        for row, first in enumerate(begun):
            if first and (sample.max_new_tokens == 1 or first[0] in self.ends(sample)):
                answers[row] = self.answer(read[row].cache, prompt, first, read[row].seconds, 0.0)
        rows = [row for row in range(len(read)) if row not in answers]  # of the batch

        def complete(place: int, new: list[int], until_first: float, after: float) -> None:
            item, given = read[rows[place]], begun[rows[place]]
            if given:  # the first token came with the prompt
                until_first, after = 0.0, until_first + after
            answers[rows[place]] = self.answer(item.cache, prompt, given + new, item.seconds + until_first, after)

        decode_together(
            self.model,
            [read[row].cache for row in rows],
            [prompt.question_ids if agnostic else begun[row] for row in rows],
            limit=sample.max_new_tokens - (0 if agnostic else 1),
            ends=self.ends(sample),
            not_first=self.ends(sample) if sample.stop_at_newline and agnostic else (),
            on_end=complete,
        )
        for row, item in enumerate(read):
            yield item.method, answers[row]
