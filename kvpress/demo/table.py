"""The demo's table, and what it says in words."""

from rich.markup import escape
from rich.table import Table

from kvpress.demo.measure import QUERY_AWARE, Measurement
from kvpress.demo.run import FULL, STOCK, DemoResult


def demo_table(result: DemoResult) -> Table:
    """One row a run."""
    stored = "" if result.kv_dtype is None else f" stored as {result.kv_dtype}"
    table = Table(
        title=f"Pass key {result.key} in {result.prompt_tokens:,} tokens, budget {result.budget:,} tokens{stored}"
    )
    table.add_column("policy", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    table.add_column("answer", no_wrap=True, max_width=28)
    table.add_column("right?", no_wrap=True)
    for name in ("kept / seen tokens", "cache MB held / full", "prefill s", "ms per token"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in result.runs:
        table.add_row(
            run.policy,
            run.mode,
            escape(" ".join(run.answer.split())),
            "[green]right[/]" if run.right else "[red]wrong[/]",
            f"{run.kept_tokens:,.0f} / {run.seen_tokens:,}",
            f"{run.held_bytes / 1e6:.1f} / {run.full_bytes / 1e6:.1f}",
            f"{run.prefill_seconds:.1f}",
            "-" if run.token_milliseconds is None else f"{run.token_milliseconds:.0f}",
        )
    return table


def verdict(result: DemoResult) -> list[str]:
    """What the runs show, in plain sentences."""
    lines = []
    if not all(run.right for run in result.runs if run.policy == STOCK):
        lines.append(
            "The full cache itself does not give the key, so this model and prompt say nothing about the policies."
        )
    if full_cache_agrees(result):
        lines.append("DynamicCache and the `full` policy, in both modes, give the same answer.")
    else:
        lines.append("The `full` policy answers otherwise than DynamicCache: that is a fault of this package.")
    compressed = [run for run in result.runs if run.policy not in (STOCK, FULL)]
    lines.append("Keep the key: " + listed([run for run in compressed if run.right]) + ".")
    lines.append("Lose the key: " + listed([run for run in compressed if not run.right]) + ".")
    lines.append(
        "Query-aware: the cache is compressed with the question in the prompt. Query-agnostic: before it is known."
    )
    lines.append("This is one prompt, not a rate.")
    return lines


def listed(runs: list[Measurement]) -> str:
    """Policies with the mode in which the runs were, a policy that shows up in both once."""
    modes: dict[str, list[str]] = {}
    for run in runs:
        modes.setdefault(run.policy, []).append("aware" if run.mode == QUERY_AWARE else "agnostic")
    return ", ".join(f"{policy} ({' and '.join(found)})" for policy, found in modes.items()) or "none"


def full_cache_agrees(result: DemoResult) -> bool:
    """Whether the `full` policy gave the answer of transformers' own cache, in both modes."""
    return len({run.answer for run in result.runs if run.policy in (STOCK, FULL)}) <= 1
