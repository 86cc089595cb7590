"""The text that needles are hidden in: repeated noise, lines of other needles, or prose."""

import re
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from random import Random

from ..errors import DataError
from .prose import sentences

# RULER's noise haystack: these five sentences, repeated.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# RULER draws depths, in percent of the sentences, from 40 evenly spaced values.
DEPTHS = tuple(round(100 * step / 39) for step in range(40))

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


class Prose:
    """The first words of a long text: generated (default), or a text file, repeated when it is too short.

    Every sample of a run reads the same prefix; only the needles differ (RULER's rule).

    Raises:
        DataError: the file holds no words, or cannot be read.
    """

    def __init__(self, path: Path | None = None, *, seed: int = 42) -> None:
        self.name = "generated prose" if path is None else path.name
        self._words: list[str] = []
        self._source: Iterator[str]
        if path is None:
            self._source = (word for sentence in sentences(seed) for word in sentence.split())
        else:
            self._source = cycle(_read_words(path))

    def text(self, words: int) -> str:
        """The first `words` words, joined by single spaces."""
        self._words.extend(islice(self._source, max(0, words - len(self._words))))
        return " ".join(self._words[:words])


def hide_in_prose(text: str, needles: list[str], depths: list[float]) -> str:
    """Insert needle i between the sentences of `text` at the i-th smallest of `depths` (percent, 0 to 100)."""
    parts = _SENTENCE_END.split(text.strip())
    positions = sorted(int(len(parts) * depth / 100) for depth in depths)
    for position, needle in reversed(list(zip(positions, needles, strict=True))):
        parts.insert(position, needle)
    return " ".join(parts)


def hide_in_lines(lines: list[str], needles: list[str], rng: Random, depth: float | None = None) -> str:
    """Insert needles as lines of their own at distinct random indexes, or one needle at `depth` percent."""
    if depth is None:
        indexes = sorted(rng.sample(range(len(lines)), len(needles)), reverse=True)
    else:
        indexes = [int(len(lines) * depth / 100)] * len(needles)
    result = list(lines)
    for index, needle in zip(indexes, needles, strict=True):
        result.insert(index, needle)
    return "\n".join(result)


def _read_words(path: Path) -> list[str]:
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the haystack must be a readable UTF-8 text file ({error})") from error
    if not words:
        raise DataError(f"{path}: the haystack file holds no words")
    return words
