"""A profile as one HTML page that needs no other file, and its figure as PNG."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Sequence
from pathlib import Path

from kvpress.longbench.errors import require
from kvpress.longbench.report.style import draw
from kvpress.profiling.figure import profile_figure
from kvpress.profiling.quantities import written_bytes
from kvpress.profiling.table import Row, failures, peak_above, tier_bytes, tier_names


def plotting_libraries() -> None:
    """Look for what figures and the page need.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    require("matplotlib", "plot", "Drawing figures")
    require("jinja2", "plot", "Writing the profile's page")


def write_page(rows: Sequence[Row], folder: Path, command: Sequence[str]) -> tuple[Path, Path]:
    """Write `profile.png` and `profile.html` into `folder`.

    Args:
        rows: at least one that did not fail.
        command: shown as the way to repeat it.

    Returns:
        The paths of the page and of the figure.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        ValueError: every row failed.
    """
    measured = [row for row in rows if "error" not in row]
    if not measured:
        raise ValueError("rows must hold at least one measurement that did not fail")
    jinja2 = require("jinja2", "plot", "Writing the profile's page")
    png = draw(profile_figure, measured)
    figure, page = folder / "profile.png", folder / "profile.html"
    figure.write_bytes(png)
    loaders = [jinja2.PackageLoader(package, ".") for package in ("kvpress.profiling", "kvpress.longbench.report")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["bytes"] = written_bytes
    page.write_text(
        environment.get_template("profile.html.j2").render(
            rows=measured,
            failures=failures(rows),
            png=base64.b64encode(png).decode("ascii"),
            peak=peak_above,
            tiers=tier_names(measured),
            tier_bytes=tier_bytes,
            command=shlex.join(command),
        ),
        encoding="utf-8",
    )
    return page, figure
