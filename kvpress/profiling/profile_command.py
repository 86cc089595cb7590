"""`kvpress profile`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpress.cli_bundles import bundled
from kvpress.cli_options import JsonOption, Loading, Storage
from kvpress.cli_refusals import STOPPED, fail, note, refusals
from kvpress.profiling.options import CONTEXT, SETTINGS, Budgets, Chunk, Contexts, Policies, Stock, budgets_of

if TYPE_CHECKING:
    from kvpress.profiling.candidates import Candidate
    from kvpress.profiling.job import Job

RESULTS = "profile.jsonl"
app = typer.Typer(**SETTINGS)

Batches = Annotated[
    str, typer.Option("--batch", help="Rows at once, separated by commas: throughput against batch size.")
]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to generate after each prompt.")]
Seed = Annotated[int, typer.Option(help="Seed of the generated prose.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for profile.jsonl, profile.png and profile.html.")]
Plot = Annotated[
    bool | None,
    typer.Option("--plot/--no-plot", help="Draw the figure and the page; left out: if matplotlib is there."),
]
Snapshot = Annotated[
    Path | None, typer.Option("--cuda-snapshot", help="Folder for the history of CUDA memory of each measurement.")
]


@app.command(
    context_settings=CONTEXT,
    epilog="Examples: `kvpress profile -p snapkv,tova -c 1k,4k` · `kvpress profile -p all -b 1024 -c 16k --json`"
    " · `kvpress profile -m ./my-model -p snapkv:window=64,quest -b 0.1,0.25 -c 4k --batch 1,4 -o results/mine`",
)
@bundled
def profile(
    *,
    loading: Loading,
    storage: Storage,
    policies: Policies = None,
    contexts: Contexts = "1k,4k",
    budget: Budgets = None,
    batch: Batches = "1",
    new_tokens: NewTokens = 32,
    chunk_size: Chunk = None,
    stock: Stock = True,
    seed: Seed = 0,
    output: Output = Path("results/profile"),
    plot: Plot = None,
    cuda_snapshot: Snapshot = None,
    as_json: JsonOption = False,
) -> None:
    """Memory and time of prefill and decoding, each policy, context and batch size in a fresh process.

    Generated prose is read and continued. Prints a table, or with --json a line of JSON for each measurement; writes the
    lines, a figure and an HTML page to the output folder. `kvpress fit` says what memory a context takes without running
    it; `kvpress bench` gives the speed of decoding as a ratio in one process.
    """
    with refusals():
        from kvpress.profiling.candidates import make_candidates
        from kvpress.profiling.quantities import parse_list
        from kvpress.profiling.run import make_jobs

        lengths, sizes = parse_list(contexts, "contexts"), parse_list(batch, "batch")
        candidates = make_candidates(policies or ["full"], budgets_of(budget), stock=stock, kv_dtype=storage.kv_dtype)
        plot = _wants_plot(plot)
        offload = storage.offload()
        _check_model(loading, cuda_snapshot, max(lengths) + new_tokens)
        jobs = make_jobs(
            loading.model,
            candidates,
            lengths,
            sizes,
            cuda_snapshot=cuda_snapshot,
            new_tokens=new_tokens,
            dtype=loading.dtype,
            device=loading.device,
            threads=loading.threads,
            chunk_size=chunk_size,
            seed=seed,
            offload=offload,
        )
        _tell_budgetless(candidates, budget)
        output.mkdir(parents=True, exist_ok=True)
        (output / RESULTS).touch()
    rows = run(jobs, output / RESULTS, as_json=as_json)
    show(rows, output, plot=plot, as_json=as_json)


def run(jobs: list[Job], results: Path, *, as_json: bool) -> list[dict[str, Any]]:
    """Do the jobs; a line of each goes to the file as soon as it is there, and with `as_json` to standard output."""
    from kvpress.console import progress_bar
    from kvpress.profiling.run import run_jobs

    rows = []
    try:
        with results.open("w", encoding="utf-8") as file, progress_bar(remaining=True) as bar:
            task = bar.add_task("Profiling", total=len(jobs))
            for job, row in zip(jobs, run_jobs(jobs), strict=True):
                rows.append(row)
                line = json.dumps(row, ensure_ascii=False)
                file.write(line + "\n")
                file.flush()
                if as_json:
                    typer.echo(line)
                bar.update(task, advance=1, description=f"{job.label}, {job.context:,} tokens")
    except KeyboardInterrupt as error:
        typer.secho(f"stopped; {len(rows)} of {len(jobs)} measurements are in {results}", err=True, fg="yellow")
        raise typer.Exit(STOPPED) from error
    return rows


def show(rows: list[dict[str, Any]], output: Path, *, plot: bool, as_json: bool) -> None:
    """Table, figure and page; exit code 1 when a measurement failed."""
    from kvpress.console import print_table
    from kvpress.profiling.table import failures, profile_table

    written = [output / RESULTS]
    if plot and any("error" not in row for row in rows):
        from kvpress.profiling.page import write_page

        written += write_page(rows, output, ["kvpress", *sys.argv[1:]])
    if not as_json:
        print_table(profile_table(rows))
        typer.echo("written: " + ", ".join(map(str, written)))
    fail(failures(rows))


def _wants_plot(asked: bool | None) -> bool:
    from kvpress.longbench.errors import MissingExtraError
    from kvpress.profiling.page import plotting_libraries

    if asked is False:
        return False
    try:
        plotting_libraries()
    except MissingExtraError as error:
        if asked:
            raise
        note(f"no figure and no page: {error}")
        return False
    return True


def _check_model(loading: Loading, snapshot: Path | None, longest: int) -> None:
    """Refuse what every child would refuse, before the first one starts."""
    from kvpress.models.load import parse_device, parse_dtype
    from kvpress.profiling.configuration import load_config
    from kvpress.support import check_config

    parse_dtype(loading.dtype)
    chosen = parse_device(loading.device)
    if snapshot is not None and chosen.type != "cuda":
        raise ValueError(f"cuda-snapshot needs a CUDA device, got {str(chosen)!r}")
    config = load_config(loading.model).get_text_config(decoder=True)
    check_config(config)
    window = getattr(config, "max_position_embeddings", None)
    if window is not None and longest > window:
        note(f"{longest:,} tokens exceed the model's window of {window:,}: bytes and times hold, its text does not")


def _tell_budgetless(candidates: list[Candidate], budget: list[str] | None) -> None:
    """Say which policies a budget that was asked for says nothing to."""
    from kvpress.profiling.candidates import STOCK

    names = [candidate.label for candidate in candidates if candidate.budget is None and candidate.name != STOCK]
    if budget and names:
        note(f"--budget says nothing to {', '.join(names)}: measured with their own parameters")
