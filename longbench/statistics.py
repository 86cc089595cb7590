"""Confidence intervals of mean scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Interval:
    """Mean of scores in [0, 1] and the bounds of its confidence interval; `method` is "wilson" or "bootstrap"."""

    mean: float
    lower: float
    upper: float
    count: int
    method: str


def mean_interval(scores: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean with a Wilson interval where all scores are 0 or 1, else with a percentile bootstrap (10,000 draws).

    A bootstrap of scores that are all equal has no width; it is reported as such, with its count.

    Raises:
        ValueError: no scores, or a confidence outside (0, 1).
    """
    if not scores:
        raise ValueError("scores must hold at least one value")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    count = len(scores)
    mean = math.fsum(scores) / count
    if all(score in (0, 1) for score in scores):
        return Interval(mean, *wilson(mean, count, confidence), count, "wilson")
    return Interval(mean, *_bootstrap([scores], confidence, seed), count, "bootstrap")


def stratified_interval(scores: Mapping[str, Sequence[float]], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of the tasks' means, every task weighing the same, with a bootstrap that redraws within each task."""
    if len(scores) == 1:
        return mean_interval(*scores.values(), confidence=confidence, seed=seed)
    means = [math.fsum(values) / len(values) for values in scores.values()]
    mean = math.fsum(means) / len(means)
    strata = [scores[task] for task in sorted(scores)]
    count = sum(len(values) for values in strata)
    return Interval(mean, *_bootstrap(strata, confidence, seed), count, "bootstrap")


def _bootstrap(strata: Sequence[Sequence[float]], confidence: float, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    means = np.zeros(10_000)
    for scores in strata:
        # Sorted: the interval depends on the scores, not on the order in which they were measured.
        values = np.sort(np.asarray(scores, dtype=np.float64))
        means += values[rng.integers(0, len(values), size=(10_000, len(values)))].mean(axis=1) / len(strata)
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(means, [tail, 1 - tail])
    return float(lower), float(upper)


def wilson(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` trials (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)
