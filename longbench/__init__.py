"""Evaluation of cache policies: RULER, LongBench, needle grids, perplexity and divergence from the full cache.

Only light modules are imported here; everything else is imported by its own name,
for instance `from kvpress.longbench.runner import evaluate`.
"""

from .errors import DataError, MissingExtraError
from .sample import Sample, Skipped

__all__ = ["DataError", "MissingExtraError", "Sample", "Skipped"]
