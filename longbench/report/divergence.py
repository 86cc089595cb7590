"""Perplexity runs: the ratio to the full cache's perplexity, the divergence, and its course along the continuation."""

from collections import defaultdict
from typing import Any

from .budgets import budget_axis, lines_of, policies_of, set_budget_axis
from .load import RunData
from .style import FULL_COLOUR, colour_of, panels, shared_legend


def divergence_figure(run: RunData) -> Any:
    """Three panels over the budget: perplexity ratio, KL divergence, and agreement of the most likely token."""
    figure, all_axes = panels(3)
    axis, policies, methods = budget_axis(run), policies_of(run), run.totals["methods"]
    measures = [
        ("ratio", "Perplexity / full cache's", 1),
        ("kl", "KL(full ‖ policy), nats a token", None),
        ("agreement", "Same most likely token (%)", 100),
    ]
    for axes, (name, title, full) in zip(all_axes, measures, strict=True):
        if full is not None:
            axes.axhline(full, color=FULL_COLOUR, linestyle=(0, (4, 2)), linewidth=1.2, label="full cache")
        values = []
        for policy, points in lines_of(run, axis, lambda label, name=name: methods[label].get(name)):
            colour, marker = colour_of(policy, policies)
            values += [value for _, value in points]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4.5, label=policy)
        if name == "kl" and values and min(values) > 0 and max(values) / min(values) > 30:
            axes.set_yscale("log")
        axes.set_title(title, loc="left")
        if axis.places:
            set_budget_axis(axes, axis)
    shared_legend(figure, all_axes[0])
    return figure


def course_figure(run: RunData) -> Any:
    """Divergence in four stretches of the continuation, one line for each method."""
    figure, (axes,) = panels(1, width=6.2, height=3.2)
    policies = policies_of(run)
    seen: dict[str, int] = defaultdict(int)
    for label in run.methods:
        if label == "full":
            continue
        rows = [row for row in run.rows if row["method"] == label]
        stretches = [
            sum(row["buckets"][part]["kl"] for row in rows)
            / max(1, sum(row["buckets"][part]["tokens"] for row in rows))
            for part in range(len(rows[0]["buckets"]))
        ]
        colour, marker = colour_of(rows[0]["policy"], policies)
        style = ("-", "--", ":", "-.")[seen[rows[0]["policy"]] % 4]
        seen[rows[0]["policy"]] += 1
        names = [
            f"{100 * part // len(stretches)} to {100 * (part + 1) // len(stretches)} %"
            for part in range(len(stretches))
        ]
        axes.plot(names, stretches, color=colour, marker=marker, markersize=4, linestyle=style, label=label)
    axes.set_title("KL(full ‖ policy) along the continuation, nats a token", loc="left")
    axes.set_xlabel("Stretch of the continuation")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
