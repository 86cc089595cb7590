"""LongBench's retrieval and count scores: the share of the numbers in the answer that are the right one."""

import re


def count_score(prediction: str, reference: str) -> float:
    """Share of the integers in the prediction that equal the reference; 0 without integers."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference.strip()) / len(numbers) if numbers else 0.0


def retrieval_score(prediction: str, reference: str) -> float:
    """As `count_score`, for a reference "Paragraph N"."""
    return count_score(prediction, _number(r"Paragraph (\d+)", reference))


def retrieval_zh_score(prediction: str, reference: str) -> float:
    """As `count_score`, for a reference "段落N"."""
    return count_score(prediction, _number(r"段落(\d+)", reference))


def _number(pattern: str, reference: str) -> str:
    match = re.search(pattern, reference)
    if match is None:
        raise ValueError(f"reference must match {pattern!r}, not {reference!r}")
    return match.group(1)
