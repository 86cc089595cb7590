"""Pages of slots: bounds of their keys, and the bounds these give on a query's scores."""

from kvpress.kernels.pages.api import choose_pages, page_bounds, page_scores, page_slots

__all__ = ["choose_pages", "page_bounds", "page_scores", "page_slots"]
