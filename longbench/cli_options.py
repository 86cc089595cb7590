"""Options that several benchmarks share, as they stand in `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from kvpress.cli_options import JsonOption

Lengths = Annotated[
    str, typer.Option("--lengths", "-l", help="Tokens of prompt and answer, separated by commas; 4k is 4 x 1,024.")
]
Tasks = Annotated[str, typer.Option("--tasks", "-t", help="Names separated by commas, or all.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Samples of each task; left out: all.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="Folder or archive of the official files; left out: the hub.")
]
Revision = Annotated[str, typer.Option(help="Commit, tag or branch of the hub's data set.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest prompt in tokens; longer ones lose their middle.")]
Prompts = Annotated[Path | None, typer.Option(exists=True, help="JSON file that replaces the official prompts.")]
Haystack = Annotated[Path | None, typer.Option(exists=True, help="Text file instead of generated prose.")]


@dataclass(frozen=True)
class Comparing:
    """What every benchmark compares, and how it goes about it."""

    panel: ClassVar[str] = "Comparison"

    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results; a stopped run goes on there.")]
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="Policy, or name:parameter=value,…; repeat for more.")
    ] = None
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="Tokens (1024), share (0.25), bytes (256MB); repeat for more."),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of generated samples.")] = 42
    chunk_size: Annotated[
        int | None, typer.Option("--chunk-size", min=1, help="Tokens of one forward during prefill.")
    ] = None
    methods_at_once: Annotated[
        int,
        typer.Option("--methods-at-once", min=1, help="Methods that share a prefill; their caches are held at once."),
    ] = 8
    decode_together: Annotated[
        bool, typer.Option("--decode-together", help="Decode them as one batch: faster on a CPU, equal up to rounding.")
    ] = False
    as_json: JsonOption = False


@dataclass(frozen=True)
class Asking:
    """How a benchmark asks that has questions."""

    panel: ClassVar[str] = "How questions are asked"

    query_aware: Annotated[
        bool, typer.Option("--query-aware/--query-agnostic", help="Compress after or before the question is read.")
    ] = False
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Wrap prompts in the chat template.")] = False
    full: Annotated[bool, typer.Option("--full/--no-full", help="Run the full cache too.")] = True
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cap of the answers in tokens, below the benchmark's own limit.")
    ] = None
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster (auto, ray://…), or local.")] = None
    workers: Annotated[int, typer.Option(min=1, help="Worker processes with --ray; each loads the model.")] = 2
