"""Metrics of RULER and LongBench; every score lies in [0, 1] and is the best over the accepted answers."""

from .registry import METRICS, score

__all__ = ["METRICS", "score"]
