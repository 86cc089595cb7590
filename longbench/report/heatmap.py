"""Needle heat maps: context length across, depth down, one map for each method."""

from collections import defaultdict
from typing import Any

import numpy as np

from .load import RunData
from .style import first_in_row, panels


def heatmap_figure(run: RunData) -> Any:
    """Mean score in percent of every cell; cells without a result stay white."""
    cells: dict[str, dict[tuple[float, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in run.rows:
        length, depth = row["details"]["cell"]
        cells[row["method"]][length, depth].append(row["score"])
    lengths = sorted({length for method in cells.values() for length, _ in method})
    depths = sorted({depth for method in cells.values() for _, depth in method})
    wide = max(2.4, 0.42 * len(lengths) + 1.2)
    figure, all_axes = panels(len(cells), width=wide, height=max(1.9, 0.26 * len(depths) + 0.9), columns=4)
    image = None
    for axes, method in zip(all_axes, run.methods, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for (length, depth), scores in cells[method].items():
            grid[depths.index(depth), lengths.index(length)] = 100 * sum(scores) / len(scores)
        image = axes.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axes.set_title(method, loc="left")
        axes.set_xticks(
            range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45 if len(lengths) > 4 else 0
        )
        axes.set_yticks(range(len(depths)), [f"{depth:g}%" for depth in depths])
        axes.grid(False)
        axes.set_xlabel("Length (tokens)")
        if first_in_row(axes):
            axes.set_ylabel("Depth of the needle")
        if len(lengths) * len(depths) <= 60:
            for (down, across), value in np.ndenumerate(grid):
                if not np.isnan(value):
                    colour = "black" if value > 60 else "white"
                    axes.text(across, down, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
    colour_bar = figure.colorbar(image, ax=all_axes, fraction=0.04, pad=0.02)
    colour_bar.set_label("Score (%)")
    colour_bar.outline.set_linewidth(0.5)
    return figure
