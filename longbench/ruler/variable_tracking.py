"""Variable tracking (`vt`): a chain of assignments scattered in noise, with one solved example in front."""

import string
from collections.abc import Callable
from itertools import pairwise
from random import Random

from .draft import Draft, fill
from .haystack import NOISE
from .length import largest_fitting
from .templates import VARIABLE_TRACKING

HOPS = 4
EXAMPLE_TOKENS = 500  # RULER builds its solved example for a length of 500 tokens


class VariableTracking:
    """Draws samples of `vt`; the example's size is fitted once with the model's own tokenizer.

    Args:
        count_tokens: tokens of a text.
        seed: fixes the example's layout, which is equal in all samples (its names and value are not).
    """

    def __init__(self, count_tokens: Callable[[str], int], seed: int) -> None:
        self._seed = seed
        self._example_lines = max(
            HOPS + 1,
            largest_fitting(lambda lines: count_tokens(self._example(lines, Random(seed))) <= EXAMPLE_TOKENS),
        )

    def draw(self, units: int, rng: Random) -> Draft:
        """A chain of HOPS + 1 variables with five-letter names in `units` lines of noise."""
        names, value = _names(5, rng), str(rng.randrange(10_000, 99_999))
        context = _scatter(names, value, units, rng)
        parts = fill(VARIABLE_TRACKING, context=context, query=value, count=HOPS + 1)
        example = self._example(self._example_lines, rng)
        return Draft(example + "\n" + parts[0], parts[1], parts[2], tuple(names), {"value": value})

    def _example(self, lines: int, rng: Random) -> str:
        names, value = _names(3, rng), str(rng.randrange(10_000, 99_999))
        context = _scatter(names, value, lines, Random(f"vt example/{self._seed}"))
        parts = fill(VARIABLE_TRACKING, context=context, query=value, count=HOPS + 1)
        return "".join(parts) + " " + " ".join(names) + "\n"


def _names(letters: int, rng: Random) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def _scatter(names: list[str], value: str, lines: int, rng: Random) -> str:
    statements = [f"VAR {names[0]} = {value}"]
    statements += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    text = [NOISE] * max(lines, len(statements))
    positions = sorted(rng.sample(range(len(text)), len(statements)))
    # Later statements are inserted first, so each stands before the noise line that its position named.
    for position, statement in reversed(list(zip(positions, statements, strict=True))):
        text.insert(position, statement)
    return "\n".join(text)
