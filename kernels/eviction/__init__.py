"""The moves of steady decoding: which slot leaves, and the new token written over it."""

from kvpress.kernels.eviction.api import overwrite, weakest

__all__ = ["overwrite", "weakest"]
