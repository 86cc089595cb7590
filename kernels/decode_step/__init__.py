"""A decoded token's way through a layer that keeps every token, in one call."""

from kvpress.kernels.decode_step.prepared import PreparedStep

__all__ = ["PreparedStep"]
