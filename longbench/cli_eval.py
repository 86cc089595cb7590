"""`kvpress eval …`. Torch and transformers wait until a benchmark runs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpress.cli_bundles import bundled
from kvpress.cli_options import Loading, Storage
from kvpress.cli_refusals import refusals

from .cli_options import Asking, Comparing, Data, Haystack, Lengths, Limit, MaxLength, Prompts, Revision, Tasks

if TYPE_CHECKING:
    from .benchmarks import Run

Benchmark = Callable[["Run"], dict[str, Any]]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Measure what policies cost in accuracy.",
    epilog="Examples: `kvpress eval ruler -p snapkv -p h2o -b 0.5 -b 0.25 -l 1024,2048 -n 20`"
    " · `kvpress eval perplexity -p streaming_llm -b 0.25` · `kvpress report results/ruler`",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_RULER, _NEEDLE, _LONGBENCH, _LONGBENCH_V2, _PERPLEXITY = (
    Comparing(Path("results") / name) for name in ("ruler", "needle", "longbench", "longbench-v2", "perplexity")
)


@app.command(
    epilog="Example: `kvpress eval ruler -p snapkv:window=64 -p h2o -b 0.25 -t niah_single_2,vt -l 1024,2048 -n 20`"
)
@bundled
def ruler(
    *,
    loading: Loading,
    comparing: Comparing = _RULER,
    storage: Storage,
    tasks: Tasks = "all",
    lengths: Lengths = "4096",
    samples: Annotated[int, typer.Option("--samples", "--limit", "-n", min=1, help="Of each task and length.")] = 100,
    haystack: Haystack = None,
    squad: Annotated[Path | None, typer.Option(exists=True, help="SQuAD 2.0 JSON for qa_1.")] = None,
    hotpotqa: Annotated[Path | None, typer.Option(exists=True, help="HotpotQA JSON for qa_2.")] = None,
    asking: Asking,
) -> None:
    """RULER's 13 tasks; without files, qa_1 and qa_2 ask about synthetic documents."""

    def benchmark(run: "Run") -> dict[str, Any]:
        from kvpress.profiling.quantities import parse_list

        from .arguments import parse_names
        from .benchmarks import run_ruler
        from .ruler import TASKS, RulerData

        names = parse_names(tasks, tuple(TASKS), "tasks")
        sizes = parse_list(lengths, "lengths")
        return run_ruler(run, tasks=names, lengths=sizes, samples=samples, data=RulerData(haystack, squad, hotpotqa))

    execute(benchmark, loading, comparing, storage, asking)


@app.command(epilog="Example: `kvpress eval needle -p snapkv -b 0.25 -l 1024,2048 --depths 0,50,100`")
@bundled
def needle(
    *,
    loading: Loading,
    comparing: Comparing = _NEEDLE,
    storage: Storage,
    lengths: Lengths = "1024,2048,4096",
    depths: Annotated[
        str, typer.Option(help="Percent of the text before the needle, separated by commas.")
    ] = "0,25,50,75,100",
    samples: Annotated[int, typer.Option("--samples", "--limit", "-n", min=1, help="Of each cell.")] = 10,
    kind: Annotated[str, typer.Option(help="essay or noise.")] = "essay",
    haystack: Haystack = None,
    asking: Asking,
) -> None:
    """One fact at every depth of every length."""

    def benchmark(run: "Run") -> dict[str, Any]:
        from kvpress.profiling.quantities import parse_list

        from .arguments import parse_numbers
        from .benchmarks import run_needle
        from .needle import KINDS
        from .ruler import RulerData

        if kind not in KINDS:
            raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")

        sizes = parse_list(lengths, "lengths")
        places = parse_numbers(depths, "depths")
        return run_needle(run, lengths=sizes, depths=places, samples=samples, haystack=kind, data=RulerData(haystack))

    execute(benchmark, loading, comparing, storage, asking)


@app.command(
    epilog="Example: `kvpress eval longbench -m ./my-model --data FOLDER -p snapkv -b 1024 -t hotpotqa,qasper`"
)
@bundled
def longbench(
    *,
    loading: Loading,
    comparing: Comparing = _LONGBENCH,
    storage: Storage,
    tasks: Tasks = "all",
    data: Data = None,
    revision: Revision = "main",
    limit: Limit = None,
    max_length: MaxLength = None,
    extended: Annotated[bool, typer.Option("--extended", help="LongBench-E, averaged by length.")] = False,
    prompts: Prompts = None,
    asking: Asking,
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

    execute(benchmark, loading, comparing, storage, asking)


@app.command(
    "longbench-v2", epilog="Example: `kvpress eval longbench-v2 -m ./my-model --data data.json -p snapkv -b 1024`"
)
@bundled
def longbench_v2(
    *,
    loading: Loading,
    comparing: Comparing = _LONGBENCH_V2,
    storage: Storage,
    data: Data = None,
    revision: Revision = "main",
    limit: Limit = None,
    max_length: MaxLength = None,
    prompts: Prompts = None,
    asking: Asking,
) -> None:
    """LongBench v2: 503 questions with four choices."""

    def benchmark(run: "Run") -> dict[str, Any]:
        from .benchmarks import run_longbench_v2
        from .tasks.source import hub_source, local_source
        from .tasks.version2 import HUB_FILE, HUB_ID

        source = local_source(data) if data else hub_source(HUB_ID, filename=HUB_FILE, revision=revision)
        return run_longbench_v2(run, source, limit=limit, max_length=max_length, prompts=prompts)

    execute(benchmark, loading, comparing, storage, asking)


@app.command(epilog="Example: `kvpress eval perplexity -p streaming_llm -p snapkv -b 0.25 --prefix 1024`")
@bundled
def perplexity(
    *,
    loading: Loading,
    comparing: Comparing = _PERPLEXITY,
    storage: Storage,
    text: Annotated[Path | None, typer.Option(exists=True, help="UTF-8 text; left out: generated prose.")] = None,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens that are compressed.")] = 1024,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens that are scored after them.")] = 256,
    windows: Annotated[int, typer.Option("--windows", "--limit", "-n", min=1, help="Windows of the text.")] = 10,
    step: Annotated[int, typer.Option(min=1, help="Tokens of the continuation in one forward; 1 as decoding.")] = 1,
) -> None:
    """Perplexity of a text after a compressed prefix, and KL divergence to the full cache's predictions."""

    def benchmark(run: "Run") -> dict[str, Any]:
        from .benchmarks import run_text_perplexity

        return run_text_perplexity(run, text=text, prefix=prefix, continuation=continuation, windows=windows, step=step)

    execute(benchmark, loading, comparing, storage, Asking())


def execute(benchmark: Benchmark, loading: Loading, comparing: Comparing, storage: Storage, asking: Asking) -> None:
    """Check what was typed, load the model, run, and print the totals."""
    with refusals(stopped="stopped; the same command goes on from here"):
        from .arguments import parse_methods

        methods = parse_methods(
            comparing.policy or [],
            comparing.budget or [],
            full=asking.full,
            kv_dtype=storage.kv_dtype,
            offload=storage.offload(),
        )
        loaded, tokenizer = loading.load()
        from .benchmarks import RayCluster, Run

        address = None if asking.ray == "local" else asking.ray
        run = Run(
            loaded,
            tokenizer,
            methods,
            comparing.output,
            loading.model,
            query_aware=asking.query_aware,
            chat=asking.chat,
            seed=comparing.seed,
            chunk_size=comparing.chunk_size,
            command=["kvpress", *sys.argv[1:]],
            progress=not comparing.as_json,
            ray=RayCluster(loading.load, address, asking.workers) if asking.ray else None,
            methods_at_once=comparing.methods_at_once,
            decode_together=comparing.decode_together,
            answer_tokens=asking.answer_tokens,
        )
        totals = benchmark(run)
    _show(totals, comparing.output, as_json=comparing.as_json)


def _show(totals: dict[str, Any], output: Path, *, as_json: bool) -> None:
    if as_json:
        from kvpress.console import write_json

        write_json(totals)
        return
    from .report.terminal import print_totals

    print_totals(totals)
    typer.echo(f"{totals['samples']} results in {output}; see them with: kvpress report {output}")
    if totals["skipped"]:
        typer.secho(f"{totals['skipped']} left out: {output / 'skipped.jsonl'}", err=True, fg="yellow")
