"""The loop: methods by contexts by questions, each result written before the next is begun."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from ..metrics import score
from ..prompt import EncodedPrompt, PromptEncoder
from ..sample import Sample, Skipped
from .generation import Answer
from .method import Method
from .progress import progress_bar
from .store import ResultStore
from .totals import totals_of


class Engine(Protocol):
    """Whatever answers samples: a model, or a stand-in."""

    def answers(self, method: Method, batch: Sequence[tuple[Sample, EncodedPrompt]]) -> Iterator[Answer]:
        """Answers of samples that share one context, in order."""
        ...


# Samples of one context under one method; whoever works on them prefills the context once.
WorkItem = tuple[Method, Sequence[Sample]]
Results = Iterator[tuple[Method, Sample, Answer]]


def evaluate(
    samples: Sequence[Sample],
    methods: Sequence[Method],
    engine: Engine,
    encoder: PromptEncoder,
    store: ResultStore,
    *,
    skipped: Sequence[Skipped] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Score every sample under every method that the store has no result for yet, and write the totals.

    Questions about one context are asked together, so that a method prefills the context once.

    Returns:
        The totals of everything in the store (`totals.json`).

    Raises:
        ValueError: two methods or two samples of one name.
    """

    def one_by_one(items: Sequence[WorkItem]) -> Results:
        for method, pending in items:
            batch = [(sample, encoder.encode(sample)) for sample in pending]
            for sample, answer in zip(pending, engine.answers(method, batch), strict=True):
                yield method, sample, answer

    return evaluate_with(one_by_one, samples, methods, store, skipped=skipped, progress=progress)


def evaluate_with(
    answer_all: Callable[[Sequence[WorkItem]], Results],
    samples: Sequence[Sample],
    methods: Sequence[Method],
    store: ResultStore,
    *,
    skipped: Sequence[Skipped] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """As `evaluate`, for any way to work through the items: `answer_all` yields results in any order."""
    _distinct("methods", [method.label for method in methods])
    _distinct("samples", [sample.sample_id for sample in samples])
    store.write_skipped(skipped)
    done = {method.label: store.done(method.label) for method in methods}
    items = [
        (method, pending)
        for method in methods
        for group in _by_context(samples)
        if (pending := [sample for sample in group if sample.sample_id not in done[method.label]])
    ]
    total, missing = len(samples) * len(methods), sum(len(pending) for _, pending in items)
    with progress_bar(total, done=total - missing, enabled=progress) as advance:
        for method, sample, answer in answer_all(items):
            store.append(result_row(method, sample, answer))
            advance(f"{method.label} {sample.task}")
    totals = totals_of(store.rows, skipped)
    store.write_totals(totals)
    return totals


def fit_window(samples: Sequence[Sample], encoder: PromptEncoder, window: int) -> tuple[list[Sample], list[Skipped]]:
    """Leave out samples whose prompt and answer limit exceed the model's window of `window` tokens."""
    kept, skipped = [], []
    for sample in samples:
        needed = encoder.length(sample) + sample.max_new_tokens
        if needed <= window:
            kept.append(sample)
        else:
            reason = f"prompt and answer need {needed} tokens, and the model's window holds {window}"
            skipped.append(Skipped(sample.sample_id, sample.details.get("line"), reason))
    return kept, skipped


def result_row(method: Method, sample: Sample, answer: Answer) -> dict[str, Any]:
    """What is kept of one result."""
    return {
        "sample": sample.sample_id,
        "task": sample.task,
        "groups": list(sample.groups),
        "method": method.label,
        "policy": method.policy,
        "budget": method.budget,
        "options": dict(method.options),
        "metric": sample.metric,
        "score": score(sample.metric, answer.prediction, sample.references, sample.details),
        "references": list(sample.references),
        **vars(answer),
        "details": dict(sample.details),
    }


def _by_context(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: dict[tuple[str, bool], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.context, sample.chat), []).append(sample)
    return list(groups.values())


def _distinct(name: str, values: list[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{name} must be distinct, and {value!r} comes twice")
        seen.add(value)
