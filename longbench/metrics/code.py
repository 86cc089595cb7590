"""LongBench's code completion score: edit similarity of the first line that is code."""

from ..errors import require


def code_similarity(prediction: str, reference: str) -> float:
    """Indel similarity in [0, 1], rounded to whole percent, of the first line without "`", "#" and "//".

    LongBench uses fuzzywuzzy, whose ratio is rapidfuzz's rounded to an integer.

    Raises:
        MissingExtraError: rapidfuzz is not installed.
    """
    fuzz = require("rapidfuzz.fuzz", "eval", "Scoring code completion")
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return float(round(fuzz.ratio(line, reference)) / 100)
