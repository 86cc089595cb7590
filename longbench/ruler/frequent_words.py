"""Frequent words extraction (`fwe`): coded words whose counts follow Zipf's law with exponent 2."""

import math
import string
from random import Random

from .draft import Draft, fill
from .templates import FREQUENT_WORDS

WORD_LETTERS = 6
ZETA_2 = math.pi**2 / 6


def draw_frequent_words(units: int, rng: Random, *, prompt_tokens: int, seed: int) -> Draft:
    """A text of about `units` words; rank 1 is written "..." and ignored, ranks 2 to 4 are the answers.

    Args:
        prompt_tokens: room for the prompt in tokens; the vocabulary has one word for 50 of them (at least 4).
        seed: orders the text; equal for all samples, as in RULER.
    """
    size = max(4, prompt_tokens // 50)
    vocabulary: set[str] = set()
    while len(vocabulary) < size:
        vocabulary.add("".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS)))
    ranked = sorted(vocabulary)
    rng.shuffle(ranked)
    ranked[0] = "..."
    text = [word for rank, word in enumerate(ranked, start=1) for _ in range(int(units / rank**2 / ZETA_2))]
    Random(seed).shuffle(text)
    parts = fill(FREQUENT_WORDS, context=" ".join(text))
    return Draft(*parts, tuple(ranked[1:4]))
