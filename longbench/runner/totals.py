"""Averages of results with their intervals; equal results give equal bytes, in whatever order they came."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..sample import Skipped
from ..statistics import Interval, mean_interval, stratified_interval


def totals_of(rows: Sequence[Mapping[str, Any]], skipped: Iterable[Skipped] = ()) -> dict[str, Any]:
    """Scores in percent with two decimals, by method and group, and the number of rows left out.

    A group whose name starts with "average" is the mean of its tasks' means; any other is the mean of its samples.
    """
    scores: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    shares: dict[str, list[float]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["method"], row["sample"])):
        for group in row["groups"]:
            scores[row["method"]][group][row["task"]].append(row["score"])
        if row.get("full_bytes"):
            shares[row["method"]].append(row["cache_bytes"] / row["full_bytes"])
    methods = {
        method: {
            "groups": {name: _entry(name, tasks) for name, tasks in sorted(groups.items())},
            "memory_share": round(sum(shares[method]) / len(shares[method]), 4) if shares[method] else None,
            **tier_means([row for row in rows if row["method"] == method]),
        }
        for method, groups in sorted(scores.items())
    }
    return {"methods": methods, "samples": len(rows), "skipped": len(list(skipped))}


def tier_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """`{"tiers": {tier: mean bytes}}` of one method's results, the nearest tier first; empty where nothing was offloaded."""
    names = dict.fromkeys(name for row in rows for name in row.get("tiers", ()))
    means = {name: round(sum(row["tiers"].get(name, 0) for row in rows) / len(rows)) for name in names}
    return {"tiers": means} if means else {}


def _entry(name: str, tasks: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    if name.startswith("average"):
        interval = stratified_interval(tasks)
    else:
        interval = mean_interval([score for task in sorted(tasks) for score in tasks[task]])
    return percent(interval)


def percent(interval: Interval) -> dict[str, Any]:
    """An interval in percent, as it stands in `totals.json`."""
    return {
        "score": round(100 * interval.mean, 2),
        "lower": round(100 * interval.lower, 2),
        "upper": round(100 * interval.upper, 2),
        "n": interval.count,
        "interval": interval.method,
    }
