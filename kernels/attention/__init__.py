"""Attention over slots: all of them or an index list, equally long or ragged heads, causal by position."""

from kvpress.kernels.attention.api import attend, attend_with_weights

__all__ = ["attend", "attend_with_weights"]
