"""Attention mass: how much softmax weight each slot receives from a set of query rows."""

from kvpress.kernels.attention_mass.api import attention_mass

__all__ = ["attention_mass"]
