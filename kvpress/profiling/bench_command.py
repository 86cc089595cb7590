"""`kvpress bench`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from kvpress.cli import DeviceOption, DtypeOption, ModelOption, ThreadsOption, load, write_json
from kvpress.profiling.options import (
    CONTEXT,
    SETTINGS,
    Budgets,
    Contexts,
    Json,
    Policies,
    budgets_of,
    fail,
    refused,
)

app = typer.Typer(**SETTINGS)

Batch = Annotated[int, typer.Option("--batch", min=1, help="Rows at once.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Decoding steps of each cache that are timed.")]
Fill = Annotated[
    str, typer.Option("--fill", help="`random` keys and values, or `prompt`: every cache reads generated prose first.")
]


@app.command(
    context_settings=CONTEXT,
    epilog="Examples: `kvpress bench -p snapkv,streaming_llm -b 1024 -c 8k,32k` · `kvpress bench -m ./my-model -p quest -c 16k --json`",
)
def bench(
    model: ModelOption = "smollm2",
    policies: Policies = None,
    contexts: Contexts = "1k,8k",
    budget: Budgets = None,
    batch: Batch = 1,
    steps: Steps = 15,
    fill: Fill = "random",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: Json = False,
) -> None:
    """Speed of decoding against the stock cache, as a ratio measured in one process.

    All caches hold the context at once and take turns token by token, so that a busy machine slows them alike; figures are medians.
    First the `full` policy must give the stock cache's logits. Memory and prefill are measured by `kvpress profile`, which gives each
    cache a process of its own.
    """
    with refused():
        from kvpress.profiling.bench import FILLS
        from kvpress.profiling.candidates import make_candidates
        from kvpress.profiling.quantities import parse_list

        if fill not in FILLS:
            raise ValueError(f"fill must be one of {list(FILLS)}, got {fill!r}")
        lengths = parse_list(contexts, "contexts")
        candidates = make_candidates(policies or ["full", "streaming_llm", "snapkv"], budgets_of(budget), stock=True)
        for length in lengths:
            for candidate in candidates:
                candidate.policy(length)
        loaded, tokenizer = load(model, dtype, device, threads)

        import torch

        from kvpress.console import progress_bar
        from kvpress.profiling.bench import bench as run_bench
        from kvpress.profiling.bench import check

        rows = []
        with progress_bar() as bar:
            task = bar.add_task("Comparing logits", total=len(lengths) * len(candidates))
            checked = check(loaded, tokenizer)
            if checked["agree"]:
                for length in lengths:

                    def advance(label: str, length: int = length) -> None:
                        bar.update(task, advance=1, description=f"{label}, {length:,} tokens")

                    rows += run_bench(
                        loaded, tokenizer, candidates, length, batch=batch, steps=steps, fill=fill, advance=advance
                    )
    threads_used, load_average = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts = {"model": model, "dtype": str(loaded.dtype).removeprefix("torch."), "device": str(loaded.device)}
    if as_json:
        write_json({**facts, "threads": threads_used, "load": load_average, "check": checked, "rows": rows})
    elif checked["agree"]:
        from kvpress.console import output_console
        from kvpress.profiling.table import bench_table

        output_console().print(
            bench_table(rows, f"Decoding of {model}: {facts['dtype']}, {facts['device']}, {threads_used} threads")
        )
    if not checked["agree"]:
        fail(
            [
                f"the full policy's logits differ from the stock cache's by {checked['difference']:.1e} of the largest: nothing is timed"
            ]
        )
    fail([f"{row['label']} at {row['context']:,} tokens: {row['error']}" for row in rows if "error" in row])
