"""Totals of runs as tables in Markdown, for documents: a row for each policy, a column for each budget."""

import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .accuracy import accuracy_groups
from .load import RunData, budget_size, load_runs

Cell = Callable[[Mapping[str, Any]], str | None]


def markdown_tables(folder: Path | str) -> str:
    """Tables of the run in `folder`, or of the runs in the folders inside it.

    Raises:
        DataError: the folder holds no results, or a damaged file.
    """
    return "\n".join(part for run in load_runs(Path(folder)) for part in _section(run))


def _section(run: RunData) -> list[str]:
    lines = [f"### {run.name}", ""]
    for command in run.commands:
        lines += [f"    {shlex.join(command)}"]
    lines += [""] if run.commands else []
    if run.benchmark == "perplexity":
        lines += ["Perplexity over that of the full cache, with the KL divergence from it in nats a token.", ""]
        lines += _table(run, lambda entry: f"{entry.get('ratio', float('nan')):.3f} (KL {entry['kl']:.3f})")
        full = run.totals["methods"].get("full")
        if full is not None:
            lines += [
                "",
                f"Full cache: perplexity {full['perplexity']:.2f} over {full['tokens']} tokens, {full['windows']} windows.",
            ]
        return [*lines, ""]
    for group in accuracy_groups(run):
        counts = sorted(
            {entry["groups"][group]["n"] for entry in run.totals["methods"].values() if group in entry["groups"]}
        )
        size = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        lines += [f"{group}: percent with 95 % interval, n = {size}.", ""]
        lines += [*_table(run, partial(_score, group)), ""]
    return lines


def _score(group: str, method: Mapping[str, Any]) -> str | None:
    entry = method["groups"].get(group)
    return None if entry is None else f"{entry['score']:.0f} ({entry['lower']:.0f}-{entry['upper']:.0f})"


def _table(run: RunData, cell: Cell) -> list[str]:
    """A row for each policy and its options; a policy without a budget stands in the last column."""
    first = {row["method"]: row for row in reversed(run.rows)}
    budgets = sorted({(budget_size(row), str(row["budget"])) for row in first.values() if row["budget"] is not None})
    columns = [name for _, name in reversed(budgets)]
    rows: dict[str, dict[str | None, str]] = {}
    for label in run.methods:
        row = first[label]
        found = cell(run.totals["methods"][label])
        if found is not None:
            budget = None if row["budget"] is None else str(row["budget"])
            rows.setdefault(_name(row), {})[budget] = found
    last = any(None in cells for cells in rows.values())
    header = ["policy", *(_percent(name) for name in columns), *(["no budget"] if last else [])]
    order: list[str | None] = [*columns, *([None] if last else [])]
    lines = [header, ["---"] * len(header)]
    lines += [[name, *(cells.get(budget, "") for budget in order)] for name, cells in rows.items()]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _name(row: Mapping[str, Any]) -> str:
    notes = [f"{name}={value}" for name, value in row["options"].items()]
    notes += ["offload"] if row.get("offload") else []
    name = f"{row['policy']} ({', '.join(notes)})" if notes else str(row["policy"])
    return name.replace("|", "\\|")


def _percent(budget: str) -> str:
    """A share as percent; tokens and bytes as they are."""
    try:
        return f"{100 * float(budget):g} %" if "." in budget else budget
    except ValueError:
        return budget
