"""`kvpress eval …` and `kvpress report`. Torch and transformers wait until a benchmark runs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import (
    AnswerTokens,
    AtOnce,
    Aware,
    Budgets,
    Chat,
    Chunk,
    Data,
    Device,
    Dtype,
    Full,
    Haystack,
    Json,
    Lengths,
    Limit,
    MaxLength,
    Model,
    Output,
    Policies,
    Prompts,
    Ray,
    Revision,
    Seed,
    Threads,
    Together,
    Workers,
)
from .errors import MissingExtraError

if TYPE_CHECKING:
    from .benchmarks import Run

FAILED, BAD_INPUT, STOPPED = 1, 2, 130

eval_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure what policies cost in accuracy.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
report_app = typer.Typer(pretty_exceptions_enable=False)
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Evaluation of cache policies.")
# Every argument goes to the harness as it stands, --help included.
_PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

lm_eval_app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(eval_app, name="eval")


@dataclass(frozen=True)
class _Common:
    """Options of every benchmark."""

    model: str
    policies: list[str] | None
    budgets: list[str] | None
    output: Path
    query_aware: bool = False
    chat: bool = False
    full: bool = True
    seed: int = 42
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    chunk_size: int | None = None
    as_json: bool = False
    ray: str | None = None
    workers: int = 2
    methods_at_once: int = 8
    decode_together: bool = False
    answer_tokens: int | None = None

    def execute(self, benchmark: "Callable[[Run], dict[str, Any]]") -> None:
        with _refusals():
            from .arguments import parse_methods

            methods = parse_methods(self.policies or [], self.budgets or [], full=self.full)
            loaded, tokenizer = _load(self.model, self.dtype, self.device, self.threads)
            from .benchmarks import RayCluster, Run

            load = partial(_load, self.model, self.dtype, self.device, self.threads)
            address = None if self.ray == "local" else self.ray
            cluster = RayCluster(load, address, self.workers) if self.ray else None
            run = Run(
                loaded,
                tokenizer,
                methods,
                self.output,
                self.model,
                query_aware=self.query_aware,
                chat=self.chat,
                seed=self.seed,
                chunk_size=self.chunk_size,
                command=["kvpress", *sys.argv[1:]],
                progress=not self.as_json,
                ray=cluster,
                methods_at_once=self.methods_at_once,
                decode_together=self.decode_together,
                answer_tokens=self.answer_tokens,
            )
            totals = benchmark(run)
        _show(totals, self.output, as_json=self.as_json)


@eval_app.command()
def ruler(
    model: Model = "smollm2",
    policy: Policies = None,
    budget: Budgets = None,
    output: Output = Path("results/ruler"),
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="Names separated by commas, or all.")] = "all",
    lengths: Lengths = "4096",
    samples: Annotated[int, typer.Option("--samples", "--limit", "-n", min=1, help="Of each task and length.")] = 100,
    haystack: Haystack = None,
    squad: Annotated[Path | None, typer.Option(exists=True, help="SQuAD 2.0 JSON for qa_1.")] = None,
    hotpotqa: Annotated[Path | None, typer.Option(exists=True, help="HotpotQA JSON for qa_2.")] = None,
    query_aware: Aware = False,
    chat: Chat = False,
    full: Full = True,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    chunk_size: Chunk = None,
    as_json: Json = False,
    ray: Ray = None,
    workers: Workers = 2,
    methods_at_once: AtOnce = 8,
    decode_together: Together = False,
    answer_tokens: AnswerTokens = None,
) -> None:
    """RULER's 13 tasks; without files, qa_1 and qa_2 ask about synthetic documents."""

    def benchmark(run: "Run") -> dict[str, Any]:
        from .arguments import parse_names, parse_numbers
        from .benchmarks import run_ruler
        from .ruler import TASKS, RulerData

        names = parse_names(tasks, tuple(TASKS), "tasks")
        sizes = [int(size) for size in parse_numbers(lengths, "lengths")]
        return run_ruler(run, tasks=names, lengths=sizes, samples=samples, data=RulerData(haystack, squad, hotpotqa))

    _Common(
        model,
        policy,
        budget,
        output,
        query_aware,
        chat,
        full,
        seed,
        dtype,
        device,
        threads,
        chunk_size,
        as_json,
        ray,
        workers,
        methods_at_once,
        decode_together,
        answer_tokens,
    ).execute(benchmark)


@eval_app.command()
def needle(
    model: Model = "smollm2",
    policy: Policies = None,
    budget: Budgets = None,
    output: Output = Path("results/needle"),
    lengths: Lengths = "1024,2048,4096",
    depths: Annotated[
        str, typer.Option(help="Percent of the text before the needle, separated by commas.")
    ] = "0,25,50,75,100",
    samples: Annotated[int, typer.Option("--samples", "--limit", "-n", min=1, help="Of each cell.")] = 10,
    kind: Annotated[str, typer.Option(help="essay or noise.")] = "essay",
    haystack: Haystack = None,
    query_aware: Aware = False,
    chat: Chat = False,
    full: Full = True,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    chunk_size: Chunk = None,
    as_json: Json = False,
    ray: Ray = None,
    workers: Workers = 2,
    methods_at_once: AtOnce = 8,
    decode_together: Together = False,
    answer_tokens: AnswerTokens = None,
) -> None:
    """One fact at every depth of every length."""

    def benchmark(run: "Run") -> dict[str, Any]:
        from .arguments import parse_numbers
        from .benchmarks import run_needle
        from .ruler import RulerData

        sizes = [int(size) for size in parse_numbers(lengths, "lengths")]
        places = parse_numbers(depths, "depths")
        return run_needle(run, lengths=sizes, depths=places, samples=samples, haystack=kind, data=RulerData(haystack))

    _Common(
        model,
        policy,
        budget,
        output,
        query_aware,
        chat,
        full,
        seed,
        dtype,
        device,
        threads,
        chunk_size,
        as_json,
        ray,
        workers,
        methods_at_once,
        decode_together,
        answer_tokens,
    ).execute(benchmark)


@eval_app.command()
def longbench(
    model: Model = "smollm2",
    policy: Policies = None,
    budget: Budgets = None,
    output: Output = Path("results/longbench"),
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="Names separated by commas, or all.")] = "all",
    data: Data = None,
    revision: Revision = "main",
    limit: Limit = None,
    max_length: MaxLength = None,
    extended: Annotated[bool, typer.Option("--extended", help="LongBench-E, averaged by length.")] = False,
    prompts: Prompts = None,
    query_aware: Aware = False,
    chat: Chat = False,
    full: Full = True,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    chunk_size: Chunk = None,
    as_json: Json = False,
    ray: Ray = None,
    workers: Workers = 2,
    methods_at_once: AtOnce = 8,
    decode_together: Together = False,
    answer_tokens: AnswerTokens = None,
) -> None:
    """LongBench's 21 tasks, or the 13 of LongBench-E."""

    def benchmark(run: "Run") -> dict[str, Any]:
        from .arguments import parse_names
        from .benchmarks import run_longbench
        from .tasks import EXTENDED_TASKS, TASKS
        from .tasks.source import hub_source, local_source

        names = parse_names(tasks, EXTENDED_TASKS if extended else tuple(TASKS), "tasks")
        source = local_source(data) if data else hub_source(revision=revision)
        return run_longbench(
            run, source, tasks=names, extended=extended, limit=limit, max_length=max_length, prompts=prompts
        )

    _Common(
        model,
        policy,
        budget,
        output,
        query_aware,
        chat,
        full,
        seed,
        dtype,
        device,
        threads,
        chunk_size,
        as_json,
        ray,
        workers,
        methods_at_once,
        decode_together,
        answer_tokens,
    ).execute(benchmark)


@eval_app.command("longbench-v2")
def longbench_v2(
    model: Model = "smollm2",
    policy: Policies = None,
    budget: Budgets = None,
    output: Output = Path("results/longbench-v2"),
    data: Data = None,
    revision: Revision = "main",
    limit: Limit = None,
    max_length: MaxLength = None,
    prompts: Prompts = None,
    query_aware: Aware = False,
    chat: Chat = False,
    full: Full = True,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    chunk_size: Chunk = None,
    as_json: Json = False,
    ray: Ray = None,
    workers: Workers = 2,
    methods_at_once: AtOnce = 8,
    decode_together: Together = False,
    answer_tokens: AnswerTokens = None,
) -> None:
    """LongBench v2: 503 questions with four choices."""

    def benchmark(run: "Run") -> dict[str, Any]:
        from .benchmarks import run_longbench_v2
        from .tasks.source import hub_source, local_source
        from .tasks.version2 import HUB_FILE, HUB_ID

        source = local_source(data) if data else hub_source(HUB_ID, filename=HUB_FILE, revision=revision)
        return run_longbench_v2(run, source, limit=limit, max_length=max_length, prompts=prompts)

    _Common(
        model,
        policy,
        budget,
        output,
        query_aware,
        chat,
        full,
        seed,
        dtype,
        device,
        threads,
        chunk_size,
        as_json,
        ray,
        workers,
        methods_at_once,
        decode_together,
        answer_tokens,
    ).execute(benchmark)


@eval_app.command()
def perplexity(
    model: Model = "smollm2",
    policy: Policies = None,
    budget: Budgets = None,
    output: Output = Path("results/perplexity"),
    text: Annotated[Path | None, typer.Option(exists=True, help="UTF-8 text; left out: generated prose.")] = None,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens that are compressed.")] = 1024,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens that are scored after them.")] = 256,
    windows: Annotated[int, typer.Option("--windows", "--limit", "-n", min=1, help="Windows of the text.")] = 10,
    step: Annotated[int, typer.Option(min=1, help="Tokens of the continuation in one forward; 1 as decoding.")] = 1,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    chunk_size: Chunk = None,
    as_json: Json = False,
    methods_at_once: AtOnce = 8,
    decode_together: Together = False,
) -> None:
    """Perplexity of a text after a compressed prefix, and KL divergence to the full cache's predictions."""

    def benchmark(run: "Run") -> dict[str, Any]:
        from .benchmarks import run_text_perplexity

        return run_text_perplexity(run, text=text, prefix=prefix, continuation=continuation, windows=windows, step=step)

    _Common(
        model,
        policy,
        budget,
        output,
        seed=seed,
        dtype=dtype,
        device=device,
        threads=threads,
        chunk_size=chunk_size,
        as_json=as_json,
        methods_at_once=methods_at_once,
        decode_together=decode_together,
    ).execute(benchmark)


@report_app.command()
@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of several runs.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Left out: report/ inside the folder.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables in Markdown and write nothing.")] = False,
) -> None:
    """One self-contained HTML page, and its figures as PNG files."""
    with _refusals():
        if markdown:
            from .report.markdown import markdown_tables

            typer.echo(markdown_tables(folder))
            return
        from .report import make_report

        page = make_report(folder, output)
    typer.echo(str(page))


@lm_eval_app.command(context_settings=_PASSED_ON)
@app.command("lm-eval", context_settings=_PASSED_ON)
def lm_eval(context: typer.Context) -> None:
    """The command line of lm-evaluation-harness, with the model "kvpress": --model_args policy=snapkv,budget=0.25,…"""
    with _refusals():
        from .harness import main

        main(context.args)


@contextmanager
def _refusals() -> Iterator[None]:
    """Bad input is one line on standard error and exit code 2; a run that was stopped says how it goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.secho("stopped; the same command goes on from here", err=True, fg="yellow")
        raise typer.Exit(STOPPED) from error
    except (ValueError, MissingExtraError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(BAD_INPUT) from error


def _load(model: str, dtype: str | None, device: str | None, threads: int | None) -> tuple[Any, Any]:
    import torch

    from kvpress.models import load_model
    from kvpress.models.errors import ModelLoadError

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    except ModelLoadError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(FAILED) from error
    return loaded, tokenizer


def _show(totals: dict[str, Any], output: Path, *, as_json: bool) -> None:
    if as_json:
        import json

        typer.echo(json.dumps(totals, ensure_ascii=False, sort_keys=True))
        return
    from .report.terminal import print_totals

    print_totals(totals)
    typer.echo(f"{totals['samples']} results in {output}; see them with: kvpress report {output}")
    if totals["skipped"]:
        typer.secho(f"{totals['skipped']} left out: {output / 'skipped.jsonl'}", err=True, fg="yellow")
