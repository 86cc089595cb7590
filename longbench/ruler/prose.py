"""Seeded English-like prose that never repeats a sentence: an offline stand-in for the essays of RULER.

A repeated haystack flatters policies that drop similar keys; here every sentence is new.
"""

from collections.abc import Iterator
from random import Random

from .words import word_list

_PLACES = ("harbour", "valley", "station", "market", "library", "workshop", "garden", "bridge", "archive", "orchard")
_PEOPLE = ("the keeper", "a visitor", "my neighbour", "the clerk", "an old teacher", "the captain", "a student")
_TIMES = ("Last winter", "In the morning", "After the meeting", "Before the harvest", "On the way home", "Years later")
_LINKS = ("although", "because", "while", "until", "so that", "even though")
_PATTERNS = (
    "{time} {person} wanted to {verb} the {adjective} {noun} near the {place}.",
    "Nobody in the {place} could say why the {noun} and the {noun} had become so {adjective}.",
    "{time} the {noun} looked {adjective}, {link} {person} tried to {verb} it.",
    "It is easy to {verb} a {noun} when the {noun} beside it is {adjective}.",
    "People who {verb} every {noun} seldom notice that the {place} has grown {adjective}.",
    "What {person} remembered was a {adjective} {noun}, not the {noun} in the {place}.",
    "If you {verb} the {noun} too early, the {adjective} {noun} will be lost.",
    "{time} they agreed to {verb} the {noun}, {link} the {place} stayed {adjective}.",
    "There was a {adjective} {noun} at the {place}, and {person} began to {verb} it.",
    "The {noun} of the {place} is more {adjective} than any {noun} that {person} ever saw.",
    "To {verb} without a {noun} is what {person} called a {adjective} habit.",
    "A {adjective} {noun} may help, {link} most of us would rather {verb} the {noun}.",
)


def sentences(seed: int) -> Iterator[str]:
    """Endless sentences; equal seeds give equal sentences on every machine, and none comes twice."""
    rng = Random(f"prose/{seed}")
    nouns, adjectives, verbs = (word_list(kind) for kind in ("noun", "adjective", "verb"))
    seen: set[str] = set()
    while True:
        pieces = _PATTERNS[rng.randrange(len(_PATTERNS))]
        while "{" in pieces:
            start, end = pieces.index("{"), pieces.index("}")
            choices = {
                "time": _TIMES,
                "person": _PEOPLE,
                "place": _PLACES,
                "link": _LINKS,
                "noun": nouns,
                "adjective": adjectives,
                "verb": verbs,
            }[pieces[start + 1 : end]]
            pieces = pieces[:start] + rng.choice(choices) + pieces[end + 1 :]
        if pieces not in seen:
            seen.add(pieces)
            yield pieces
