"""Answers of a model under a method: prefill, compress, ask; with times and bytes."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from kvpress.cache_argument import passed
from kvpress.profiling.cache_bytes import bytes_in_tiers

from ..prompt import EncodedPrompt
from ..sample import Sample
from .clock import now
from .method import Method


@dataclass(frozen=True)
class Answer:
    """A generated answer. Times in seconds of wall clock; bytes are the cache's own when the answer is complete.

    `prefill_seconds` ends with the first token of the answer. A context that several questions share is prefilled
    once, and its time stands in each of their answers; a prefill that several methods share counts for each of them,
    without the work of the others' policies. Methods that decode together divide the time of a token among them.
    `full_bytes` is what an uncompressed cache would hold, `tiers` the bytes in each tier of an offloaded one.
    """

    prediction: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    full_bytes: int
    tiers: Mapping[str, int] = field(default_factory=dict)


class _FirstTokenClock(StoppingCriteria):
    """Never stops; notes when the first token was there."""

    first: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        if self.first is None:
            self.first = now(input_ids.device)
        return cast(torch.BoolTensor, torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device))


class ModelEngine:
    """Answers samples greedily, one at a time.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        query_aware: True gives the cache the whole prompt before it compresses; False compresses the context first
            and lets the question come later, from a cache that has already been compressed.
        chunk_size: tokens of one forward during prefill; None prefills in one. A policy compresses after each
            forward, so chunks change what policies keep.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, query_aware: bool = False, chunk_size: int | None = None
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        self.model = model
        self.tokenizer = tokenizer
        self.query_aware = query_aware
        self.chunk_size = chunk_size

    def answers(self, method: Method, batch: Sequence[tuple[Sample, EncodedPrompt]]) -> Iterator[Answer]:
        """Answers of samples that share one context, in order."""
        if self.query_aware or not batch[0][1].context_ids:
            for sample, prompt in batch:
                yield self.generate(method.make_cache(self.model), sample, prompt, 0.0)
            return
        start = now(self.model.device)
        cache = self.prefill(method, batch[0][1].context_ids)
        seconds = now(self.model.device) - start
        for number, (sample, prompt) in enumerate(batch, start=1):
            own = cache if number == len(batch) else copy.deepcopy(cache)
            yield self.generate(own, sample, prompt, seconds)

    @torch.no_grad()
    def prefill(self, method: Method, context_ids: Sequence[int]) -> Cache:
        """A cache that has read the context and nothing else."""
        cache = method.make_cache(self.model)
        self.feed(cache, context_ids)
        return cache

    @torch.no_grad()
    def feed(self, cache: Cache, ids: Sequence[int]) -> torch.Tensor:
        """Let the cache read `ids`, at least one; returns the logits `[vocabulary]` of the next token."""
        for chunk in chunks_of(ids, self.chunk_size):
            batch = torch.tensor([chunk], device=self.model.device)
            output = self.model(batch, **passed(self.model, cache), use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def generate(
        self, cache: Cache, sample: Sample, prompt: EncodedPrompt, prefill_seconds: float, first: int | None = None
    ) -> Answer:
        """The answer from `cache`; `first` is its first token where the cache has read the whole prompt."""
        if first is not None and (sample.max_new_tokens == 1 or first in self.ends(sample)):
            return self.answer(cache, prompt, [first], prefill_seconds, 0.0)
        given = () if first is None else (first,)
        ids = torch.tensor([(*prompt.ids, *given)], device=self.model.device)
        clock = _FirstTokenClock()
        start = now(self.model.device)
        generate: Any = self.model.generate
        output = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **passed(self.model, cache),
            generation_config=self._configuration(sample, len(given)),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        end = now(self.model.device)
        new = output[0, len(prompt) :].tolist()
        ready = start if first is not None else end if clock.first is None else clock.first
        return self.answer(cache, prompt, new, prefill_seconds + ready - start, end - ready)

    def answer(
        self, cache: Cache, prompt: EncodedPrompt, new: Sequence[int], prefill_seconds: float, decode_seconds: float
    ) -> Answer:
        """The answer whose tokens are `new`, with what `cache` holds now."""
        held = cache_bytes(cache)
        return Answer(
            self.tokenizer.decode(new, skip_special_tokens=True),
            len(prompt),
            len(new),
            prefill_seconds,
            decode_seconds,
            held,
            getattr(cache, "full_nbytes", held),
            bytes_in_tiers(cache),
        )

    def ends(self, sample: Sample) -> list[int]:
        """Token ids that end an answer."""
        ends = self.model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]
        if sample.stop_at_newline:
            ends = [*ends, self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]]
        return ends

    def _configuration(self, sample: Sample, given: int) -> GenerationConfig:
        """For an answer of which `given` tokens are there already."""
        ends = self.ends(sample)
        padding = self.tokenizer.pad_token_id
        make: Any = GenerationConfig
        configuration: GenerationConfig = make(
            max_new_tokens=sample.max_new_tokens - given,
            do_sample=False,
            num_beams=1,
            min_new_tokens=1 if sample.stop_at_newline and not given else None,
            eos_token_id=ends or None,
            pad_token_id=padding if padding is not None else (ends[0] if ends else None),
            prefill_chunk_size=self.chunk_size if self.query_aware else None,
        )
        return configuration


def chunks_of(ids: Sequence[int], size: int | None) -> Iterator[Sequence[int]]:
    """Consecutive parts of `size` tokens, or all tokens at once."""
    size = size or len(ids)
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds."""
    own = getattr(cache, "nbytes", None)
    if own is not None:
        return int(own)
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
