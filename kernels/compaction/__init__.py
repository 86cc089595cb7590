"""Compaction: the kept slots of each head, gathered into memory of their own."""

from kvpress.kernels.compaction.api import compact

__all__ = ["compact"]
