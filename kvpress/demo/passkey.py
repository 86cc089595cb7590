"""The pass-key task: five digits somewhere in a long text, and a question at the end.

After Mohtashami and Jaggi, "Landmark Attention" (arXiv:2305.16300), with prose in place of its repeated noise.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kvpress.demo.prose import sentences

NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
SENTENCES_PER_PARAGRAPH = 6


@dataclass(frozen=True)
class PasskeyTask:
    """One prompt of the pass-key task.

    Attributes:
        key: the hidden number, as five digits.
        context: the text that holds it.
        question: what follows the context; its end is the beginning of the answer.
        context_ids: token ids of the context, int64 `[1, context_tokens]`.
        prompt_ids: token ids of context and question, int64 `[1, tokens]`; begins with `context_ids`.
    """

    key: str
    context: str
    question: str
    context_ids: Any
    prompt_ids: Any

    def is_right(self, answer: str) -> bool:
        """Whether the first number in the answer is the key."""
        found = re.search(r"\d+", answer)
        return found is not None and found.group() == self.key


def make_task(tokenizer: Any, tokens: int, *, seed: int = 0, depth: float = 0.5) -> PasskeyTask:
    """Hide a pass key in generated prose.

    Args:
        tokenizer: the model's tokenizer.
        tokens: length wanted of the whole prompt, in tokens; reached to within a sentence, never exceeded.
        seed: chooses the key and the prose.
        depth: where the key lies, 0 (start of the text) to 1 (end of the text).

    Raises:
        ValueError: tokens leaves no room for any prose, or depth is outside 0 to 1.
    """
    import torch

    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie between 0 and 1, not {depth}")
    key = str(random.Random(f"key {seed}").randrange(10_000, 100_000))

    def context_of(count: int) -> str:
        told = list(islice(sentences(seed), count))
        told.insert(round(depth * count), NEEDLE.format(key=key))
        return paragraphs(told)

    def prompt_tokens(count: int) -> int:
        return len(tokenizer(context_of(count) + QUESTION)["input_ids"])

    count = largest_fitting(prompt_tokens, tokens)
    if count < 1:
        raise ValueError(f"tokens must leave room for the key and at least one sentence, {tokens} do not")
    context = context_of(count)
    # Two calls, so that the prompt is the context plus more, whatever the tokenizer would merge across the seam.
    context_ids = tokenizer(context)["input_ids"]
    question_ids = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    return PasskeyTask(key, context, QUESTION, torch.tensor([context_ids]), torch.tensor([context_ids + question_ids]))


def paragraphs(told: list[str]) -> str:
    """Join sentences into paragraphs of `SENTENCES_PER_PARAGRAPH`."""
    groups = [told[start : start + SENTENCES_PER_PARAGRAPH] for start in range(0, len(told), SENTENCES_PER_PARAGRAPH)]
    return "\n".join(" ".join(group) for group in groups)


def largest_fitting(size_of: Callable[[int], int], limit: int) -> int:
    """The largest n >= 0 with `size_of(n) <= limit`, for a growing `size_of`; 0 when even 1 does not fit."""
    high = 1
    while size_of(high) <= limit:
        high *= 2
    low = 0 if high == 1 else high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size_of(middle) <= limit else (low, middle)
    return low
