"""From the folders of runs to one HTML page and its figures."""

from .make import make_report

__all__ = ["make_report"]
