"""A decoded token's way through a layer in one call."""

from kvpress.kernels.decode_step.eviction import PreparedEviction
from kvpress.kernels.decode_step.prepared import PreparedStep

__all__ = ["PreparedEviction", "PreparedStep"]
