"""One look for all figures: colours of Okabe and Ito (safe for colour-blind readers), thin axes, no chart junk."""

import io
from collections.abc import Sequence
from typing import Any

from ..errors import require

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FULL_COLOUR = "#222222"
SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "legend.frameon": False,
    "font.family": "DejaVu Sans",
}


def draw(make: Any, *arguments: Any) -> bytes:
    """PNG bytes of the figure that `make(*arguments)` returns, in the project's style and without global state.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "plot", "Drawing figures")
    with matplotlib.rc_context(SETTINGS):
        figure = make(*arguments)
        buffer = io.BytesIO()
        # No date in the file: equal results give equal bytes.
        figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def panels(count: int, *, width: float = 3.3, height: float = 2.7, columns: int = 3) -> tuple[Any, list[Any]]:
    """A figure with `count` panels in rows of at most `columns`."""
    figure_module = require("matplotlib.figure", "plot", "Drawing figures")
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = figure_module.Figure(figsize=(max(4.2, width * columns), height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for spare in axes[count:]:
        spare.remove()
    return figure, list(axes[:count])


def first_in_row(axes: Any) -> bool:
    """Whether a panel stands at the left edge; only there the vertical axis needs its name."""
    return bool(axes.get_subplotspec().is_first_col())


def colour_of(policy: str, policies: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a policy, the same in every figure of a report."""
    number = list(policies).index(policy)
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def shared_legend(figure: Any, axes: Any) -> None:
    """One legend for all panels, under them."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)))
