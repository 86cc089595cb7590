"""Choosing slots: the best of a row of scores, the largest dot products, and a selection used once more."""

from kvpress.kernels.choosing.api import best_slots, largest_products, listed_slots, reused_slots

__all__ = ["best_slots", "largest_products", "listed_slots", "reused_slots"]
