"""English word lists of the library `wonderwords` (MIT), which RULER draws its keys and word tasks from."""

from functools import cache
from importlib import resources
from random import Random

from ..errors import require


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """Sorted words of one kind: "adjective", "noun" or "verb"."""
    require("wonderwords", "eval", "RULER's word lists")
    text = resources.files("wonderwords").joinpath("assets", f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(sorted({line.strip() for line in text.splitlines() if line.strip()}))


@cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs together, sorted and unique (8166 words in wonderwords 3.0.1)."""
    return tuple(sorted({*word_list("noun"), *word_list("adjective"), *word_list("verb")}))


def adjective_noun(rng: Random) -> str:
    """One of the 6 million pairs `adjective-noun`; drawn, never listed."""
    return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"
