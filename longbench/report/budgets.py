"""The horizontal axis of a comparison: budgets as they were asked for, or the memory really held."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .load import Row, RunData


@dataclass(frozen=True)
class Axis:
    """Name of the axis, and each method's place on it."""

    label: str
    places: dict[str, float]
    percent: bool


def policies_of(run: RunData) -> list[str]:
    """Compared policies without the full cache, by name."""
    return sorted({row["policy"] for row in run.rows if row["method"] != "full"})


def budget_axis(run: RunData) -> Axis:
    """Shares in percent, tokens, or, where a run mixes kinds, the measured share of the full cache's memory."""
    first: dict[str, Row] = {row["method"]: row for row in run.rows if row["method"] != "full"}
    budgets = {label: row["budget"] for label, row in first.items()}
    if budgets and all(isinstance(budget, float) for budget in budgets.values()):
        return Axis("Budget (share of the prompt)", {label: 100 * budget for label, budget in budgets.items()}, True)
    if budgets and all(isinstance(budget, int) for budget in budgets.values()):
        return Axis("Budget (tokens)", {label: float(budget) for label, budget in budgets.items()}, False)
    shares = {label: run.totals["methods"][label]["memory_share"] for label in budgets}
    return Axis("Memory (share of the full cache)", {label: 100 * share for label, share in shares.items()}, True)


def lines_of(run: RunData, axis: Axis, value: Any) -> list[tuple[str, list[tuple[float, Any]]]]:
    """For each policy the (place, value(label)) pairs from left to right, without pairs whose value is None."""
    result = []
    for policy in policies_of(run):
        labels = {row["method"] for row in run.rows if row["policy"] == policy and row["method"] != "full"}
        points = [(axis.places[label], value(label)) for label in labels]
        result.append((policy, sorted((point for point in points if point[1] is not None), key=lambda point: point[0])))
    return result


def set_budget_axis(axes: Any, axis: Axis) -> None:
    """Logarithmic to the base 2, with a tick at every budget that was measured."""
    axes.set_xscale("log", base=2)
    places = _apart(sorted(set(axis.places.values())))
    axes.set_xticks(places, [f"{place:g}%" if axis.percent else f"{place:g}" for place in map(_short, places)])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.08)
    axes.set_xlabel(axis.label)


def _apart(places: Sequence[float]) -> list[float]:
    """Drop places that stand too near the one before to carry a label of their own."""
    kept: list[float] = []
    for place in places:
        if not kept or place / kept[-1] > 1.25:
            kept.append(place)
    return kept


def _short(value: float) -> float:
    return round(value, 1 if value < 100 else 0)
