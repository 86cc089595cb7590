"""LongBench (https://arxiv.org/abs/2308.14508): version 1 with 21 tasks, its length-balanced part E, and version 2."""

from .registry import EXTENDED_TASKS, TASKS
from .suite import longbench_samples
from .version2 import longbench_v2_samples

__all__ = ["EXTENDED_TASKS", "TASKS", "longbench_samples", "longbench_v2_samples"]
