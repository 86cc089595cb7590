"""`kvpress bench`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from kvpress.cli_bundles import bundled
from kvpress.cli_options import JsonOption, Loading, Storage
from kvpress.cli_refusals import fail, refusals
from kvpress.profiling.options import CONTEXT, SETTINGS, Budgets, Contexts, Policies, budgets_of

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
@bundled
def bench(
    *,
    loading: Loading,
    storage: Storage,
    policies: Policies = None,
    contexts: Contexts = "1k,8k",
    budget: Budgets = None,
    batch: Batch = 1,
    steps: Steps = 15,
    fill: Fill = "random",
    as_json: JsonOption = False,
) -> None:
    """Speed of decoding against the stock cache, as a ratio measured in one process.

    All caches hold the context at once and take turns token by token, so that a busy machine slows them alike; figures are medians.
    First the `full` policy must give the stock cache's logits. Limits of offload are of one cache, not of all together. Memory and
    prefill are measured by `kvpress profile`, which gives each cache a process of its own.
    """
    with refusals():
        from kvpress.profiling.bench import FILLS
        from kvpress.profiling.candidates import make_candidates
        from kvpress.profiling.quantities import parse_list

        if fill not in FILLS:
            raise ValueError(f"fill must be one of {list(FILLS)}, got {fill!r}")
        lengths = parse_list(contexts, "contexts")
        named = policies or ["full", "streaming_llm", "snapkv"]
        candidates = make_candidates(named, budgets_of(budget), stock=True, kv_dtype=storage.kv_dtype)
        offload = storage.arguments()["offload"]
        for length in lengths:
            for candidate in candidates:
                candidate.policy(length)
        loaded, tokenizer = loading.load()

        import torch

        from kvpress.console import print_table, progress_bar, write_json
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
                        loaded,
                        tokenizer,
                        candidates,
                        length,
                        batch=batch,
                        steps=steps,
                        fill=fill,
                        offload=offload,
                        advance=advance,
                    )
    threads_used, load_average = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts: dict[str, Any] = {
        "model": loading.model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
    }
    if as_json:
        facts["offload"] = storage.offload()
        write_json({**facts, "threads": threads_used, "load": load_average, "check": checked, "rows": rows})
    elif checked["agree"]:
        from kvpress.profiling.table import bench_table

        print_table(
            bench_table(
                rows, f"Decoding of {loading.model}: {facts['dtype']}, {facts['device']}, {threads_used} threads"
            )
        )
    if not checked["agree"]:
        fail(
            [
                f"the full policy's logits differ from the stock cache's by {checked['difference']:.1e} of the largest: nothing is timed"
            ]
        )
    fail([f"{row['label']} at {row['context']:,} tokens: {row['error']}" for row in rows if "error" in row])
