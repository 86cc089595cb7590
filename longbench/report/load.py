"""Reads what runs have written."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..perplexity import perplexity_totals
from ..runner.totals import totals_of

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """One run: its folder's name, settings, result lines, rows left out, and totals computed from the lines."""

    name: str
    settings: dict[str, Any]
    commands: list[list[str]]
    versions: dict[str, str]
    rows: list[Row]
    skipped: list[Row]
    totals: dict[str, Any]

    @property
    def benchmark(self) -> str:
        return str(self.settings.get("benchmark", "benchmark"))

    @property
    def methods(self) -> list[str]:
        """Labels, the full cache first, then policies by name and budgets from large to small."""
        first = {row["method"]: row for row in reversed(self.rows)}
        return sorted(
            first, key=lambda label: (label != "full", first[label]["policy"], -budget_size(first[label]), label)
        )


def budget_size(row: Row) -> float:
    """A number that orders budgets of one kind: tokens, share, or bytes; 0 for none."""
    budget = row.get("budget")
    if isinstance(budget, str):
        digits = budget.rstrip("BbIiKkMmGgTt ")
        unit = budget[len(digits) :].strip().upper().rstrip("B").rstrip("I")
        return float(digits) * 1024.0 ** ("KMGT".index(unit) + 1 if unit else 0) if digits else 0.0
    return float(budget) if budget is not None else 0.0


def load_runs(folder: Path) -> list[RunData]:
    """The run in `folder`, or the runs in the folders inside it, by name.

    Raises:
        DataError: no run with results is found, or a file is damaged; names the file and line.
    """
    places = [folder] if (folder / "run.json").exists() else sorted(path.parent for path in folder.glob("*/run.json"))
    runs = [run for run in map(_load, places) if run.rows]
    if not runs:
        raise DataError(f"{folder}: holds no run with results (no run.json, or no line in samples.jsonl)")
    return runs


def _load(folder: Path) -> RunData:
    try:
        description = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        settings, commands, versions = (description[name] for name in ("settings", "commands", "versions"))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'run.json'}: not a run's description ({error})") from error
    rows = _lines(folder / "samples.jsonl")
    skipped = _lines(folder / "skipped.jsonl")
    perplexity = settings.get("benchmark") == "perplexity"
    totals = perplexity_totals(rows) if perplexity else totals_of(rows)
    return RunData(folder.name, settings, commands, versions, rows, skipped, totals)


def _lines(path: Path) -> list[Row]:
    if not path.exists():
        return []
    rows = []
    # The last line may be half written while the run goes on; it is not a result yet.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON") from error
    return rows
