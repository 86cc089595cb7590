"""RULER's scores: accepted answers that occur in the prediction as substrings, without regard to case."""

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the prediction."""
    text = _clean(prediction)
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any reference occurs in the prediction, else 0."""
    text = _clean(prediction)
    return float(any(reference.lower() in text for reference in references))


def _clean(prediction: str) -> str:
    # RULER turns control characters into newlines and strips the ends before it compares.
    return _CONTROL.sub("\n", prediction.strip()).strip().lower()
