"""Attention over slots: all of them or an index list, equally long or ragged heads, causal by position."""

from kvpress.kernels.attention.api import attend

__all__ = ["attend"]
