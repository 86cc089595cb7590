"""One question of a benchmark, split where a query-agnostic policy must stop reading."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A prompt in three parts (their concatenation is the benchmark's own prompt) and how its answer is scored.

    Attributes:
        task: name of the task, as its benchmark spells it.
        sample_id: unique within the run; stable for equal settings, so that a run can resume.
        context: everything that is known before the question.
        question: the question and its instructions.
        answer_prefix: the first words of the answer, given to the model (after a chat template's assistant header).
        references: accepted answers, at least one.
        metric: name of the metric (`kvpress.longbench.metrics.METRICS`).
        max_new_tokens: limit of the generated answer, in tokens.
        groups: names of the averages that this sample counts in.
        details: what metric and report need (length, depth, classes); JSON values only.
        chat: whether a chat template may wrap this task's prompt.
        stop_at_newline: a newline ends the answer, after at least one token.
    """

    task: str
    sample_id: str
    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    metric: str
    max_new_tokens: int
    groups: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = True
    stop_at_newline: bool = False

    @property
    def text(self) -> str:
        """The whole prompt without a chat template."""
        return self.context + self.question + self.answer_prefix


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be evaluated: where it stands (file, or task) and why."""

    source: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        return f"{place}: {self.reason}"
