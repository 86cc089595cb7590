"""The loop: methods by contexts by questions, each result written before the next is begun."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class GroupingEngine(Engine, Protocol):
    """An engine that gains from several methods at once."""

    def answers_of(
        self, methods: Sequence[Method], batch: Sequence[tuple[Sample, EncodedPrompt]]
    ) -> Iterator[tuple[Method, Sample, Answer]]:
        """Answers of samples that share one context under every method, in any order."""
        ...


# Samples of one context, and the methods whose caches are held at once; whoever works on them prefills the context once.
WorkItem = tuple[Sequence[Method], Sequence[Sample]]
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
    group: int = 1,
    whole: bool = False,
) -> dict[str, Any]:
    """Score every sample under every method that the store has no result for yet, and write the totals.

    Questions about one context are asked together, so that a method prefills the context once.

    Args:
        group: methods that a `GroupingEngine` is asked for at once.
        whole: what an engine answers depends on which methods it is asked for: one result that is missing has its whole group
            answered again, so that a run that was stopped ends with the results of one that was not.

    Returns:
        The totals of everything in the store (`totals.json`).

    Raises:
        ValueError: two methods or two samples of one name.
    """

    def one_by_one(items: Sequence[WorkItem]) -> Results:
        for item in items:
            yield from answer_item(engine, encoder, item)

    return evaluate_with(
        one_by_one, samples, methods, store, skipped=skipped, progress=progress, group=group, whole=whole
    )


def answer_item(engine: Engine, encoder: PromptEncoder, item: WorkItem) -> Results:
    """Work through one item."""
    methods, pending = item
    batch = [(sample, encoder.encode(sample)) for sample in pending]
    if len(methods) > 1 and isinstance(engine, GroupingEngine):
        yield from engine.answers_of(methods, batch)
        return
    for method in methods:
        for sample, answer in zip(pending, engine.answers(method, batch), strict=True):
            yield method, sample, answer


def evaluate_with(
    answer_all: Callable[[Sequence[WorkItem]], Results],
    samples: Sequence[Sample],
    methods: Sequence[Method],
    store: ResultStore,
    *,
    skipped: Sequence[Skipped] = (),
    progress: bool = True,
    group: int = 1,
    whole: bool = False,
) -> dict[str, Any]:
    """As `evaluate`, for any way to work through the items: `answer_all` yields results in any order."""
    _distinct("methods", [method.label for method in methods])
    _distinct("samples", [sample.sample_id for sample in samples])
    store.write_skipped(skipped)
    done = {method.label: store.done(method.label) for method in methods}
    groups = [methods[start : start + group] for start in range(0, len(methods), group)]
    items = [item for some in groups for pending in _by_context(samples) for item in _items(some, pending, done, whole)]
    finished = sum(sample.sample_id in done[method.label] for method in methods for sample in samples)
    with progress_bar(len(samples) * len(methods), done=finished, enabled=progress) as advance:
        for method, sample, answer in answer_all(items):
            if sample.sample_id in done[method.label]:
                continue  # answered once more beside one that was missing
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
        "offload": None if method.offload is None else dict(method.offload),
        "metric": sample.metric,
        "score": score(sample.metric, answer.prediction, sample.references, sample.details),
        "references": list(sample.references),
        **vars(answer),
        "details": dict(sample.details),
    }


def _items(
    methods: Sequence[Method], samples: Sequence[Sample], done: Mapping[str, set[str]], whole: bool
) -> Iterator[WorkItem]:
    """What is missing of some methods and the samples of one context; methods that miss the same samples stay together."""
    missing: dict[tuple[str, ...], tuple[list[Method], list[Sample]]] = {}
    for method in methods:
        pending = [sample for sample in samples if sample.sample_id not in done[method.label]]
        if pending:
            key = tuple(sample.sample_id for sample in pending)
            missing.setdefault(key, ([], pending))[0].append(method)
    if missing and whole:
        yield methods, samples
    else:
        yield from missing.values()


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
