"""Accuracy against budget: a line for each policy with its interval, and the full cache across."""

from typing import Any

from .budgets import budget_axis, lines_of, policies_of, set_budget_axis
from .load import RunData
from .style import FULL_COLOUR, colour_of, first_in_row, panels, shared_legend


def accuracy_groups(run: RunData) -> list[str]:
    """Groups worth a panel: averages first, then tasks; cells of a needle grid have their own figure."""
    names = {group for method in run.totals["methods"].values() for group in method["groups"]}
    if run.benchmark == "needle":
        names = {name for name in names if name.startswith("average")}
    tasks = {name for name in names if not name.startswith("average")}
    averages = names - tasks
    # An average over one task says nothing that the task's own panel does not say.
    if averages and len({row["task"] for row in run.rows}) == 1 and run.benchmark != "needle":
        averages = set()
    return [*sorted(averages, key=_natural), *sorted(tasks, key=_natural)]


def accuracy_figure(run: RunData, groups: list[str]) -> Any:
    """One panel for each group; scores in percent with 95 % intervals."""
    figure, all_axes = panels(len(groups))
    axis, policies = budget_axis(run), policies_of(run)
    methods = run.totals["methods"]
    for axes, group in zip(all_axes, groups, strict=True):
        full = methods.get("full", {"groups": {}})["groups"].get(group)
        if full:
            axes.axhline(full["score"], color=FULL_COLOUR, linestyle=(0, (4, 2)), linewidth=1.2, label="full cache")
            axes.axhspan(full["lower"], full["upper"], color=FULL_COLOUR, alpha=0.07, linewidth=0)
        lines = lines_of(run, axis, lambda label, group=group: methods[label]["groups"].get(group))
        for number, (policy, points) in enumerate(lines):
            if not points:
                continue
            colour, marker = colour_of(policy, policies)
            # A hair to the side for each policy, so that intervals at one budget can be told apart.
            shift = 2 ** (0.05 * (number - (len(lines) - 1) / 2))
            places = [place * shift for place, _ in points]
            scores = [entry["score"] for _, entry in points]
            errors = [
                [max(0.0, e["score"] - e["lower"]) for _, e in points],
                [max(0.0, e["upper"] - e["score"]) for _, e in points],
            ]
            axes.errorbar(
                places,
                scores,
                yerr=errors,
                color=colour,
                marker=marker,
                markersize=4.5,
                capsize=2,
                elinewidth=0.8,
                label=policy,
            )
        counts = sorted({entry["groups"][group]["n"] for entry in methods.values() if group in entry["groups"]})
        axes.set_title(
            f"{group}   (n = {counts[0] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'})", loc="left"
        )
        axes.set_ylim(-3, 103)
        if first_in_row(axes):
            axes.set_ylabel("Score (%)")
        if axis.places:
            set_budget_axis(axes, axis)
        else:
            axes.set_xticks([])
    shared_legend(figure, all_axes[0])
    return figure


def _natural(name: str) -> list[Any]:
    """Sorts numbers inside names by their size."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.replace("/", " / ").split()]
