"""Memory and speed as the run measured them."""

from statistics import median
from typing import Any

from .budgets import policies_of
from .load import RunData
from .style import FULL_COLOUR, colour_of, panels


def resource_table(run: RunData) -> list[dict[str, Any]]:
    """For each method: mean bytes held, their share of a full cache, and those in each tier; medians of seconds and tokens a second."""
    table = []
    for label in run.methods:
        rows = [row for row in run.rows if row["method"] == label]
        entry: dict[str, Any] = {
            "method": label,
            "policy": rows[0]["policy"],
            "n": len(rows),
            "bytes": sum(row["cache_bytes"] for row in rows) / len(rows),
            "tiers": run.totals["methods"][label].get("tiers", {}),
            "share": 100 * sum(row["cache_bytes"] / row["full_bytes"] for row in rows if row["full_bytes"]) / len(rows),
        }
        if "prefill_seconds" in rows[0]:
            entry["prefill"] = median(row["prefill_seconds"] for row in rows)
            speeds = [
                (row["new_tokens"] - 1) / row["decode_seconds"]
                for row in rows
                if row["new_tokens"] > 1 and row["decode_seconds"] > 0
            ]
            entry["speed"] = median(speeds) if speeds else None
        table.append(entry)
    return table


def resource_figure(run: RunData) -> Any:
    """Bars: memory against the full cache, time to the first token, and tokens a second after it."""
    table = resource_table(run)
    measures = [
        ("share", "Memory (% of a full cache)"),
        ("prefill", "Time to first token (s, median)"),
        ("speed", "Decoding (tokens/s, median)"),
    ]
    shown = [(name, title) for name, title in measures if any(entry.get(name) is not None for entry in table)]
    figure, all_axes = panels(len(shown), height=max(1.4, 0.22 * len(table) + 0.4))
    policies = policies_of(run)
    labels = [entry["method"] for entry in table]
    for number, (axes, (name, title)) in enumerate(zip(all_axes, shown, strict=True)):
        values = [entry.get(name) or 0 for entry in table]
        colours = [
            FULL_COLOUR if entry["method"] == "full" else colour_of(entry["policy"], policies)[0] for entry in table
        ]
        axes.barh(range(len(table)), values, color=colours, height=0.68)
        for place, value in enumerate(values):
            axes.text(value, place, f" {value:.3g}", va="center", fontsize=7.5)
        axes.set_yticks(range(len(table)), labels if number == 0 else [""] * len(labels))
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, max(values) * 1.18 or 1)
        axes.grid(axis="y", visible=False)
        axes.set_title(title, loc="left")
    return figure
