"""Pages of slots: bounds of their keys, and the bounds these give on a query's scores."""

from kvpress.kernels.pages.api import choose_pages, page_bounds, page_scores, page_slots
from kvpress.kernels.pages.rounding import bounds_type

__all__ = ["bounds_type", "choose_pages", "page_bounds", "page_scores", "page_slots"]
