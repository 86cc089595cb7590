"""LongBench v2: the letter that the answer chooses."""

import re

_PATTERNS = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")


def extract_choice(prediction: str) -> str | None:
    """The chosen letter A to D, with or without brackets; None when the answer does not follow the format."""
    text = prediction.replace("*", "")
    for pattern in _PATTERNS:
        match = re.search(pattern, text)
        if match:
            return match.group(1)
    return None


def choice_score(prediction: str, reference: str) -> float:
    """1 if the chosen letter is the reference, else 0 (also when no letter was chosen)."""
    return float(extract_choice(prediction) == reference)
