"""Places: where the near copies of selected slots lie, and which give way to those that have none."""

from kvpress.kernels.places.api import find_places

__all__ = ["find_places"]
