"""Needle in a haystack: the eight `niah_*` tasks of RULER."""

import uuid
from dataclasses import dataclass
from random import Random

from .draft import Draft, fill
from .haystack import DEPTHS, NOISE, Prose, hide_in_lines, hide_in_prose
from .templates import NEEDLE, NIAH_MANY, NIAH_ONE
from .words import adjective_noun


@dataclass(frozen=True)
class NeedleTask:
    """Parameters of one task, under RULER's names in `synthetic.yaml`.

    Attributes:
        haystack: "noise", "essay" or "needle" (every line is a distractor of the needle's form).
        key, value: "words" (adjective-noun), "numbers" (7 digits) or "uuids" (version 4).
        keys, values, queries: keys hidden, values of each key, keys asked for.
        depth: where the needles go, in percent; None draws RULER's random depths.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    depth: float | None = None

    def draw(self, units: int, rng: Random, prose: Prose) -> Draft:
        """Hide fresh needles in `units` units: words of prose, or lines."""
        keys = _distinct(self.key, max(self.keys, self.queries), rng)
        values = {key: _distinct(self.value, self.values, rng) for key in keys}
        needles = [NEEDLE.format(kind=self.value, key=key, value=value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        depths: list[float] | None = None
        if self.haystack == "essay":
            depths = [self.depth] * len(needles) if self.depth is not None else sorted(rng.sample(DEPTHS, len(needles)))
            text = hide_in_prose(prose.text(units), needles, depths)
        else:
            lines = self._lines(units, rng)
            text = hide_in_lines(lines, needles, rng, self.depth)
        asked = rng.sample(keys, self.queries)
        answers = tuple(value for key in asked for value in values[key])
        many = len(answers) > 1
        kind = self.value if many else self.value.removesuffix("s")
        parts = fill(NIAH_MANY if many else NIAH_ONE, kind=kind, context=text, query=_join(asked))
        return Draft(*parts, answers, {"needles": needles, "depths": depths})

    def _lines(self, units: int, rng: Random) -> list[str]:
        if self.haystack == "noise":
            return [NOISE] * max(units, self._needle_count)
        return [
            NEEDLE.format(kind=self.value, key=_random(self.key, rng), value=_random(self.value, rng))
            for _ in range(max(units, self._needle_count))
        ]

    @property
    def _needle_count(self) -> int:
        return max(self.keys, self.queries) * self.values


NIAH_TASKS = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essay"),
    "niah_single_3": NeedleTask("essay", value="uuids"),
    "niah_multikey_1": NeedleTask("essay", keys=4),
    "niah_multikey_2": NeedleTask("needle"),
    "niah_multikey_3": NeedleTask("needle", key="uuids", value="uuids"),
    "niah_multivalue": NeedleTask("essay", values=4),
    "niah_multiquery": NeedleTask("essay", keys=4, queries=4),
}


def _random(kind: str, rng: Random) -> str:
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "words":
        return adjective_noun(rng)
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _distinct(kind: str, count: int, rng: Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_random(kind, rng)] = None
    return list(found)


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
