"""Common words extraction (`cwe`): a numbered list in which ten words come more often than the rest."""

from random import Random

from .draft import Draft, fill
from .templates import COMMON_WORDS
from .words import adjective_noun, all_words

COMMON = 10


def draw_common_words(units: int, rng: Random, *, max_length: int, seed: int) -> Draft:
    """`units` different words; the ten answers 30 times and the others 3 times (below 4096 tokens: 6 and 1).

    A solved example of 40 words (below 4096 tokens: 20) stands in front. As in RULER one seed orders all lists.
    """
    small = max_length < 4096
    example_words, example_list = _word_list(20 if small else 40, *((3, 1) if small else (10, 3)), rng, seed)
    words, listing = _word_list(max(units, COMMON), *((6, 1) if small else (30, 3)), rng, seed)
    example = "".join(fill(COMMON_WORDS, context=example_list)) + " " + _numbered(example_words)
    context, question, answer_prefix = fill(COMMON_WORDS, context=listing)
    return Draft(example + "\n" + context, question, answer_prefix, tuple(words))


def _word_list(count: int, common: int, uncommon: int, rng: Random, seed: int) -> tuple[list[str], str]:
    words = _draw_words(count, rng)
    listed = words[:COMMON] * common + words[COMMON:] * uncommon
    Random(seed).shuffle(listed)
    return words[:COMMON], _numbered(listed)


def _draw_words(count: int, rng: Random) -> list[str]:
    if count <= len(all_words()):
        return rng.sample(all_words(), count)
    # RULER turns to a second dictionary here; pairs of words need no data.
    pairs: dict[str, None] = {}
    while len(pairs) < count:
        pairs[adjective_noun(rng)] = None
    return list(pairs)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
