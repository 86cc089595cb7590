"""RULER (https://arxiv.org/abs/2404.06654): 13 synthetic tasks at any length."""

from .suite import TASKS, RulerData, ruler_samples

__all__ = ["TASKS", "RulerData", "ruler_samples"]
