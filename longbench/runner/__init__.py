"""Runs samples through several policies and budgets, writes one JSON line each, and resumes where it was stopped."""

from .evaluate import Engine, evaluate, fit_window
from .generation import Answer, ModelEngine
from .group import GroupEngine
from .method import FULL, CacheFactory, Method, methods_of
from .store import ResultStore

__all__ = [
    "FULL",
    "Answer",
    "CacheFactory",
    "Engine",
    "GroupEngine",
    "Method",
    "ModelEngine",
    "ResultStore",
    "evaluate",
    "fit_window",
    "methods_of",
]
