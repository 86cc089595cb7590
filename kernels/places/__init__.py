"""Places: where the near copies of selected slots lie, which give way to those that have none, and where these are read from."""

from kvpress.kernels.places.api import find_places, rows_to_read

__all__ = ["find_places", "rows_to_read"]
