"""Every way of generating, as one table: each runs a model with a cache and returns all that can be compared.

A way takes the model and a function that makes an empty cache for it, so the same way runs with a `PolicyCache`, with a
`DynamicCache`, or with a cache that is being recorded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvpress.cache_argument import passed
from kvpress.testing.families import random_tokens, tiny_model

PROMPT, NEW = 24, 5  # tokens
MakeCache = Callable[[PreTrainedModel], Cache]


@dataclass
class Outcome:
    """What a way of generating gave.

    Attributes:
        tokens: sequences, one tensor for each call of `generate`.
        logits: raw logits of every step, in order.
        cache: the cache at the end.
    """

    tokens: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    cache: Any = None

    def error(self, other: Outcome) -> float:
        """Largest absolute difference of logits; `inf` where tokens or shapes differ, or NaN."""
        same = len(self.tokens) == len(other.tokens) and len(self.logits) == len(other.logits) > 0
        if not same or not all(torch.equal(a, b) for a, b in zip(self.tokens, other.tokens, strict=True)):
            return float("inf")
        largest = max(float((a - b).abs().max()) for a, b in zip(self.logits, other.logits, strict=True))
        return float("inf") if largest != largest else largest


def _generate(outcome: Outcome, model: PreTrainedModel, ids: Tensor, cache: Cache, **options: Any) -> Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    generate: Any = model.generate
    out = generate(
        ids, **passed(model, cache), return_dict_in_generate=True, output_logits=True, pad_token_id=0, **settings
    )
    outcome.tokens.append(out.sequences)
    outcome.logits.extend(out.logits)
    outcome.cache = cache
    sequences: Tensor = out.sequences
    return sequences


def left_padded(pads: tuple[int, ...], length: int = PROMPT) -> tuple[Tensor, Tensor]:
    """A batch with `pads[i]` padding tokens at the left of row `i`: ids and attention mask `[batch, length]`."""
    ids, mask = random_tokens(len(pads), length, seed=3), torch.ones(len(pads), length, dtype=torch.long)
    for row, count in enumerate(pads):
        ids[row, :count], mask[row, :count] = 0, 0
    return ids, mask


def greedy(model: PreTrainedModel, make: MakeCache) -> Outcome:
    outcome = Outcome()
    _generate(outcome, model, random_tokens(1, PROMPT), make(model))
    return outcome


def sampling(model: PreTrainedModel, make: MakeCache) -> Outcome:
    outcome = Outcome()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        _generate(outcome, model, random_tokens(1, PROMPT), make(model), do_sample=True, num_return_sequences=3)
    return outcome


def padded_batch(model: PreTrainedModel, make: MakeCache) -> Outcome:
    """Four rows; the last but one has a single real token."""
    ids, mask = left_padded((0, 9, PROMPT - 1, 3))
    outcome = Outcome()
    _generate(outcome, model, ids, make(model), attention_mask=mask)
    return outcome


def beams(model: PreTrainedModel, make: MakeCache) -> Outcome:
    ids, mask = left_padded((0, 7))
    outcome = Outcome()
    _generate(outcome, model, ids, make(model), attention_mask=mask, num_beams=3, num_return_sequences=2)
    return outcome


def prompt_lookup(model: PreTrainedModel, make: MakeCache) -> Outcome:
    """The prompt repeats itself, so that some candidates are taken and some are rolled back."""
    piece = random_tokens(1, PROMPT // 3)
    outcome = Outcome()
    _generate(outcome, model, piece.repeat(1, 3), make(model), prompt_lookup_num_tokens=3, max_new_tokens=2 * NEW)
    return outcome


def assisted(model: PreTrainedModel, make: MakeCache) -> Outcome:
    """The assistant is the model itself with small changes, so that some of its candidates are taken."""
    assistant = tiny_model("llama", seed=0, dtype=model.dtype)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    outcome = Outcome()
    _generate(outcome, model, random_tokens(1, PROMPT), make(model), assistant_model=assistant, max_new_tokens=2 * NEW)
    return outcome


def chunked(size: int) -> Callable[[PreTrainedModel, MakeCache], Outcome]:
    """Prefill in chunks of `size` tokens, a padded batch."""

    def run(model: PreTrainedModel, make: MakeCache) -> Outcome:
        ids, mask = left_padded((0, 5))
        outcome = Outcome()
        _generate(outcome, model, ids, make(model), attention_mask=mask, prefill_chunk_size=size)
        return outcome

    return run


def turns(model: PreTrainedModel, make: MakeCache) -> Outcome:
    """Three turns, a padded batch; the middle turn is long."""
    ids, mask = left_padded((0, 6))
    outcome, cache = Outcome(), make(model)
    for turn, length in enumerate((PROMPT, 9, 3)):
        if turn:
            more = random_tokens(2, length, seed=20 + turn)
            ids = torch.cat([ids, more], dim=1)
            mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
        ids = _generate(outcome, model, ids, cache, attention_mask=mask)
    return outcome


def prefix(model: PreTrainedModel, make: MakeCache) -> Outcome:
    """A context is read first, before any question is known; then a question goes on with the same cache."""
    context = random_tokens(1, PROMPT)
    outcome, cache = Outcome(), make(model)
    with torch.no_grad():
        model(context, **passed(model, cache))
    _generate(outcome, model, torch.cat([context, random_tokens(1, 5, seed=5)], dim=1), cache)
    return outcome


def branches(model: PreTrainedModel, make: MakeCache) -> Outcome:
    """A context is read once; two questions go on with deep copies of its cache, and the first comes back."""
    context = random_tokens(1, PROMPT)
    outcome, cache = Outcome(), make(model)
    with torch.no_grad():
        model(context, **passed(model, cache))
    for seed in (5, 6, 5):
        _generate(outcome, model, torch.cat([context, random_tokens(1, 5, seed=seed)], dim=1), copy.deepcopy(cache))
    return outcome


WAYS: dict[str, Callable[[PreTrainedModel, MakeCache], Outcome]] = {
    "greedy": greedy,
    "sampling": sampling,
    "padded_batch": padded_batch,
    "beams": beams,
    "prompt_lookup": prompt_lookup,
    "assisted": assisted,
    "chunks_of_1": chunked(1),
    "chunks_of_2": chunked(2),
    "chunks_of_3": chunked(3),
    "chunks_of_7": chunked(7),
    "chunks_of_64": chunked(64),
    "chunk_of_all": chunked(PROMPT),
    "turns": turns,
    "prefix": prefix,
    "branches": branches,
}
CORE = (
    "padded_batch",
    "beams",
    "prompt_lookup",
    "chunks_of_3",
    "turns",
    "branches",
)  # the others are variations of these
ROLLING_BACK = ("prompt_lookup", "assisted")  # transformers refuses these for recurrent models
