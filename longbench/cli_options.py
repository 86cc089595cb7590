"""Options that several benchmarks share, as they stand in `--help`."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2, a local folder, a .gguf file, or a hub id.")]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", "-p", help="Policy, or name:parameter=value,…; repeat for more."),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option("--budget", "-b", help="Tokens (1024), share (0.25), bytes (256MB); repeat for more."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the results; a stopped run goes on there.")]
Aware = Annotated[
    bool, typer.Option("--query-aware/--query-agnostic", help="Compress after or before the question is read.")
]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Wrap prompts in the chat template.")]
Full = Annotated[bool, typer.Option("--full/--no-full", help="Run the full cache too.")]
Seed = Annotated[int, typer.Option(help="Seed of generated samples.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out: the checkpoint's.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda:0, …; left out: the first GPU if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
Chunk = Annotated[int | None, typer.Option("--chunk-size", min=1, help="Tokens of one forward during prefill.")]
Json = Annotated[bool, typer.Option("--json", help="Print the totals as JSON and nothing else.")]
Lengths = Annotated[str, typer.Option("--lengths", "-l", help="Tokens of prompt and answer, separated by commas.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Samples of each task; left out: all.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="Folder or archive of the official files; left out: the hub.")
]
Revision = Annotated[str, typer.Option(help="Commit, tag or branch of the hub's data set.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest prompt in tokens; longer ones lose their middle.")]
Prompts = Annotated[Path | None, typer.Option(exists=True, help="JSON file that replaces the official prompts.")]
Haystack = Annotated[Path | None, typer.Option(exists=True, help="Text file instead of generated prose.")]
Ray = Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster (auto, ray://…), or local.")]
Workers = Annotated[int, typer.Option(min=1, help="Worker processes with --ray; each loads the model.")]
AtOnce = Annotated[
    int, typer.Option("--methods-at-once", min=1, help="Methods that share a prefill; their caches are held at once.")
]
Together = Annotated[
    bool, typer.Option("--decode-together", help="Decode them as one batch: faster on a CPU, equal up to rounding.")
]
AnswerTokens = Annotated[
    int | None, typer.Option(min=1, help="Cap of the answers in tokens, below the benchmark's own limit.")
]
