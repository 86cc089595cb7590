"""The five benchmarks as functions: build the samples, open the folder, run, return the totals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .needle import needle_samples
from .perplexity import run_perplexity, text_windows
from .prompt import PromptEncoder
from .ruler import TASKS as RULER_TASKS
from .ruler import RulerData, ruler_samples
from .ruler.haystack import Prose
from .runner import GroupEngine, Method, ResultStore, evaluate, fit_window
from .runner.evaluate import Results, WorkItem, evaluate_with
from .sample import Sample, Skipped
from .tasks import longbench_samples, longbench_v2_samples
from .tasks.source import Source

# Methods that share one prefill, where nothing else is said: their caches are held at once.
METHODS_AT_ONCE = 8
# Room for answers (up to 512 tokens) and a chat template, where LongBench's prompts are cut to the model's window.
ANSWER_ROOM = 600


@dataclass(frozen=True)
class RayCluster:
    """Where workers run: `address` of a cluster ("auto", "ray://host:port") or None for a local one.

    `load` returns (model, tokenizer); it is called in each worker, and sent there, so it must not hold the model.
    """

    load: Callable[[], tuple[PreTrainedModel, Any]]
    address: str | None = None
    workers: int = 2


@dataclass(frozen=True)
class Run:
    """What all benchmarks share.

    Attributes:
        model, tokenizer: the model under test, in eval mode.
        methods: what is compared.
        output: folder of the results; a folder with part of them is continued.
        model_name: as it stands in the results.
        query_aware: compress after the question has been read; False compresses the context alone, before.
        chat: wrap prompts in the tokenizer's chat template.
        seed: of generated samples.
        chunk_size: tokens of one forward during prefill; None prefills at once.
        command: the command line, for the report.
        progress: show a bar where the terminal can.
        ray: answer samples on a Ray cluster instead of in this process (not for perplexity).
        methods_at_once: methods for which a prompt is read once, where they can share that; their caches are held at once.
        decode_together: these methods also decode as the rows of one batch: faster, and equal up to rounding.
        answer_tokens: cap of the answers, in tokens, below the benchmark's own limit.

    Raises:
        ValueError: `methods_at_once` or `answer_tokens` below 1.
    """

    model: PreTrainedModel
    tokenizer: Any
    methods: Sequence[Method]
    output: Path
    model_name: str
    query_aware: bool = False
    chat: bool = False
    seed: int = 42
    chunk_size: int | None = None
    command: Sequence[str] = ()
    progress: bool = True
    ray: RayCluster | None = None
    methods_at_once: int = METHODS_AT_ONCE
    decode_together: bool = False
    answer_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("methods_at_once", "answer_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    @property
    def window(self) -> int | None:
        """Tokens that the model was made for; None if its configuration does not say."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def encoder(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, chat=self.chat)

    def store(self, benchmark: str, **data: Any) -> ResultStore:
        """The folder, bound to everything that makes results comparable."""
        for method in self.methods:
            method.make_cache(self.model)  # a refused policy or budget stops the run before its first prompt
        settings = {
            "benchmark": benchmark,
            "model": self.model_name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "seed": self.seed,
            "query_aware": self.query_aware,
            "chat": self.chat,
            "chunk_size": self.chunk_size,
            "answer_tokens": self.answer_tokens,
            "decode_together": self.decode_together or None,
            "offload": next((dict(method.offload) for method in self.methods if method.offload is not None), None),
            "data": {name: value for name, value in data.items() if value is not None},
        }
        return ResultStore(self.output, settings, command=self.command)


def run_ruler(
    run: Run,
    *,
    tasks: Sequence[str] = tuple(RULER_TASKS),
    lengths: Sequence[int] = (4096,),
    samples: int = 100,
    data: RulerData = RulerData(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """RULER: `samples` of each task at each length in tokens; see `ruler_samples` for what is raised."""
    encoder = run.encoder()
    drawn = [
        sample
        for length in lengths
        for task in tasks
        for sample in ruler_samples(task, length, samples, encoder, seed=run.seed, data=data)
    ]
    files = {name: str(path) for name, path in vars(data).items() if path is not None}
    return _evaluate(run, "ruler", encoder, drawn, [], **files)


def run_needle(
    run: Run,
    *,
    lengths: Sequence[int] = (1024, 2048, 4096),
    depths: Sequence[float] = (0, 25, 50, 75, 100),
    samples: int = 10,
    haystack: str = "essay",
    data: RulerData = RulerData(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """The needle grid: `samples` in each cell of lengths (tokens) by depths (percent)."""
    encoder = run.encoder()
    drawn = needle_samples(lengths, depths, samples, encoder, haystack=haystack, seed=run.seed, data=data)
    file = str(data.haystack) if data.haystack else None
    return _evaluate(run, "needle", encoder, drawn, [], kind=haystack, haystack=file)


def run_longbench(
    run: Run,
    source: Source,
    *,
    tasks: Sequence[str],
    extended: bool = False,
    limit: int | None = None,
    max_length: int | None = None,
    prompts: Path | None = None,
) -> dict[str, Any]:
    """LongBench v1, or E with `extended`; `max_length` tokens of prompt, by default the window less `ANSWER_ROOM`."""
    encoder, length = run.encoder(), _prompt_limit(run, max_length)
    samples, skipped = longbench_samples(
        source, tasks, encoder, max_length=length, extended=extended, limit=limit, prompts=prompts
    )
    return _evaluate(
        run,
        "longbench-e" if extended else "longbench",
        encoder,
        samples,
        skipped,
        source=str(source.path),
        revision=source.revision,
        max_length=length,
        prompts=str(prompts) if prompts else None,
    )


def run_longbench_v2(
    run: Run, source: Source, *, limit: int | None = None, max_length: int | None = None, prompts: Path | None = None
) -> dict[str, Any]:
    """LongBench v2 without chain of thought; prompts are cut as in `run_longbench`."""
    encoder, length = run.encoder(), _prompt_limit(run, max_length)
    samples, skipped = longbench_v2_samples(source.path, encoder, max_length=length, limit=limit, prompts=prompts)
    return _evaluate(
        run,
        "longbench-v2",
        encoder,
        samples,
        skipped,
        source=str(source.path),
        revision=source.revision,
        max_length=length,
        prompts=str(prompts) if prompts else None,
    )


def run_text_perplexity(
    run: Run,
    *,
    text: Path | None = None,
    prefix: int = 1024,
    continuation: int = 256,
    windows: int = 10,
    step: int = 1,
) -> dict[str, Any]:
    """Perplexity and divergence of `continuation` tokens after `prefix` compressed ones, over windows of a text.

    Args:
        text: a UTF-8 file; None generates prose by the run's seed.
        step: tokens of the continuation in one forward; 1 reads as decoding does.
    """
    size = prefix + continuation
    if run.window is not None and size > run.window:
        raise ValueError(f"prefix and continuation need {size} tokens, and the model's window holds {run.window}")
    prose = Prose(text, seed=run.seed)
    # A word is at most a few tokens and at least a third of one; a file is read whole.
    content = prose.text(windows * size) if text is None else text.read_text(encoding="utf-8")
    parts = text_windows(
        content, run.tokenizer, prefix=prefix, continuation=continuation, limit=windows, name=prose.name
    )
    sizes = {"text": str(text) if text else None, "prefix": prefix, "continuation": continuation, "step": step}
    with run.store("perplexity", **sizes) as store:
        return run_perplexity(
            run.model,
            parts,
            run.methods,
            store,
            chunk_size=step,
            prefill_chunk_size=run.chunk_size,
            methods_at_once=run.methods_at_once,
            together=run.decode_together,
            progress=run.progress,
        )


def _evaluate(
    run: Run, benchmark: str, encoder: PromptEncoder, samples: list[Sample], skipped: list[Skipped], **data: Any
) -> dict[str, Any]:
    if run.window is not None:
        samples, too_long = fit_window(samples, encoder, run.window)
        skipped = [*skipped, *too_long]
    if run.answer_tokens is not None:
        cap = run.answer_tokens
        samples = [replace(sample, max_new_tokens=min(sample.max_new_tokens, cap)) for sample in samples]
    how: dict[str, Any] = {
        "skipped": skipped,
        "progress": run.progress,
        "group": run.methods_at_once,
        "whole": run.decode_together,
    }
    with run.store(benchmark, **data) as store:
        if run.ray is not None:
            return evaluate_with(_ray_workers(run, run.ray), samples, run.methods, store, **how)
        return evaluate(samples, run.methods, _engine(run)(run.model, run.tokenizer), encoder, store, **how)


def _engine(run: Run) -> Callable[[PreTrainedModel, Any], GroupEngine]:
    """Makes the engine; holds none of the run's own objects, so that it can be sent to workers."""
    return partial(GroupEngine, query_aware=run.query_aware, chunk_size=run.chunk_size, together=run.decode_together)


def _ray_workers(run: Run, cluster: RayCluster) -> Callable[[Sequence[WorkItem]], Results]:
    from .runner.ray_workers import ray_workers

    # Names of its own: what the workers are sent must not hold this process's model.
    load, chat, engine = cluster.load, run.chat, _engine(run)

    def worker() -> tuple[GroupEngine, PromptEncoder]:
        model, tokenizer = load()
        return engine(model, tokenizer), PromptEncoder(tokenizer, chat=chat)

    gpus = 1 if run.model.device.type == "cuda" else 0
    return ray_workers(worker, address=cluster.address, workers=cluster.workers, gpus=gpus)


def _prompt_limit(run: Run, max_length: int | None) -> int:
    if max_length is not None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, not {max_length}")
        return max_length
    if run.window is None or run.window <= ANSWER_ROOM:
        raise ValueError(f"max_length must be given for a model whose window is {run.window}")
    return run.window - ANSWER_ROOM
