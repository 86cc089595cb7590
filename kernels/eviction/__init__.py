"""The moves of steady decoding: which slot leaves, and the new token written over it."""

from kvpress.kernels.eviction.api import weakest
from kvpress.kernels.eviction.writer import RowWriter

__all__ = ["RowWriter", "weakest"]
