"""What a task's generator returns for one haystack size, before the length rule has been applied."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any


@dataclass(frozen=True)
class Draft:
    """One drawn sample: the three parts of the prompt, the accepted answers, and what to remember about it."""

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


# draw(units, index, rng): a sample with `units` units of haystack; `index` chooses the question where data has one.
Draw = Callable[[int, int, Random], Draft]


def fill(template: tuple[str, str, str], **values: object) -> tuple[str, str, str]:
    """Format the three parts of a template."""
    context, question, answer_prefix = (part.format(**values) for part in template)
    return context, question, answer_prefix
