"""The loop: methods by contexts by questions, each result written before the next is begun."""

from collections.abc import Iterator, Sequence
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
    _distinct("methods", [method.label for method in methods])
    _distinct("samples", [sample.sample_id for sample in samples])
    store.write_skipped(skipped)
    contexts = _by_context(samples)
    done = {method.label: store.done(method.label) for method in methods}
    finished = sum(sample.sample_id in done[method.label] for method in methods for sample in samples)
    with progress_bar(len(samples) * len(methods), done=finished, enabled=progress) as advance:
        for method in methods:
            for group in contexts:
                pending = [sample for sample in group if sample.sample_id not in done[method.label]]
                batch = [(sample, encoder.encode(sample)) for sample in pending]
                if batch:
                    for sample, answer in zip(pending, engine.answers(method, batch), strict=True):
                        store.append(result_row(method, sample, answer))
                        advance(f"{method.label} {sample.task}")
    totals = totals_of(store.rows, skipped)
    store.write_totals(totals)
    return totals


def fit_window(
    samples: Sequence[Sample], encoder: PromptEncoder, window: int
) -> tuple[list[Sample], list[Skipped]]:
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
        "sample": sample.sample_id, "task": sample.task, "groups": list(sample.groups),
        "method": method.label, "policy": method.policy, "budget": method.budget, "options": dict(method.options),
        "metric": sample.metric,
        "score": score(sample.metric, answer.prediction, sample.references, sample.details),
        "references": list(sample.references), **vars(answer), "details": dict(sample.details),
    }


def _by_context(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: dict[tuple[str, bool], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.context, sample.chat), []).append(sample)
    return list(groups.values())


def _distinct(name: str, values: list[str]) -> None:
    twice = next((value for value in values if values.count(value) > 1), None) if len(set(values)) < len(values) else None
    if twice is not None:
        raise ValueError(f"{name} must be distinct, and {twice!r} comes twice")
