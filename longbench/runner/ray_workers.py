"""Several processes or machines through Ray: workers hold a model each, one process writes the results.

The folder of results has one writer, as without Ray, so resuming and totals are the same. A worker that dies is
replaced and its work item given to another; an item whose workers die again and again stops the run.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import require
from ..prompt import PromptEncoder
from ..sample import Sample
from .evaluate import Engine, Results, WorkItem, answer_item
from .generation import Answer
from .method import Method

ATTEMPTS = 3

# Makes what a worker needs, inside the worker: the model is loaded there and never sent.
WorkerFactory = Callable[[], tuple[Engine, PromptEncoder]]


class _Worker:
    """Answers work items with its own model."""

    def __init__(self, factory: WorkerFactory) -> None:
        self._engine, self._encoder = factory()

    def answer(self, item: WorkItem) -> list[tuple[Method, Sample, Answer]]:
        return list(answer_item(self._engine, self._encoder, item))


def ray_workers(
    factory: WorkerFactory, *, address: str | None = None, workers: int = 2, cpus: float = 1, gpus: float = 0
) -> Callable[[Sequence[WorkItem]], Results]:
    """A way to work through items for `evaluate_with`, on a Ray cluster.

    Args:
        factory: called once in each worker.
        address: of a running cluster ("auto", "ray://host:port"); None starts a local one, and stops it at the end.
        workers: number of worker processes, at least 1.
        cpus, gpus: what each worker reserves.

    Raises:
        MissingExtraError: ray is not installed.
        ValueError: fewer than one worker.
        RuntimeError: an item's workers died `ATTEMPTS` times.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    ray = require("ray", "ray", "Running on several machines")

    def answer_all(items: Sequence[WorkItem]) -> Results:
        if not items:
            return
        own = not ray.is_initialized()
        if own:
            local = {"num_cpus": max(1, round(workers * cpus)), "_node_ip_address": "127.0.0.1"}
            options: dict[str, Any] = {} if address else local
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error", **options)
        try:
            remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Worker)
            yield from _work(ray, lambda: remote.remote(factory), items, min(workers, len(items)))
        finally:
            if own:
                ray.shutdown()

    return answer_all


def _work(ray: Any, start: Callable[[], Any], items: Sequence[WorkItem], workers: int) -> Results:
    waiting = [(item, 1) for item in reversed(items)]
    busy: dict[Any, tuple[Any, WorkItem, int]] = {}

    def give(worker: Any) -> None:
        if waiting:
            item, attempt = waiting.pop()
            busy[worker.answer.remote(item)] = worker, item, attempt

    for _ in range(workers):
        give(start())
    while busy:
        (finished,), _ = ray.wait(list(busy), num_returns=1)
        worker, item, attempt = busy.pop(finished)
        try:
            results = ray.get(finished)
        except ray.exceptions.RayActorError as error:
            if attempt == ATTEMPTS:
                methods, samples = item
                raise RuntimeError(
                    f"workers died {ATTEMPTS} times on {samples[0].sample_id} under {methods[0].label}"
                ) from error
            waiting.append((item, attempt + 1))
            worker, results = start(), []
        give(worker)
        yield from results
