"""Draws a report's figures and writes its page."""

import base64
import shlex
from pathlib import Path
from typing import Any

from ..errors import require
from .accuracy import accuracy_figure, accuracy_groups
from .divergence import course_figure, divergence_figure
from .heatmap import heatmap_figure
from .load import RunData, load_runs
from .resources import resource_figure, resource_table
from .style import draw

_TITLES = {
    "ruler": "RULER",
    "longbench": "LongBench",
    "longbench-e": "LongBench-E",
    "longbench-v2": "LongBench v2",
    "needle": "Needle grid",
    "perplexity": "Perplexity",
}


def make_report(folder: Path | str, output: Path | str | None = None) -> Path:
    """One self-contained HTML page and its figures as PNG files, for a run's folder or a folder of such folders.

    Args:
        output: where to write; `report/` inside `folder` by default.

    Returns:
        The path of the page.

    Raises:
        DataError: the folder holds no results, or a damaged file.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    folder = Path(folder)
    runs = load_runs(folder)
    target = Path(output) if output is not None else folder / "report"
    target.mkdir(parents=True, exist_ok=True)
    sections = [
        _section(run, target, f"{number}-" if len(runs) > 1 else "") for number, run in enumerate(runs, start=1)
    ]
    jinja2 = require("jinja2", "eval", "Writing the report's page")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvpress.longbench.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(sections=sections, name=folder.resolve().name)
    path = target / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _section(run: RunData, target: Path, prefix: str) -> dict[str, Any]:
    perplexity = run.benchmark == "perplexity"
    groups = [] if perplexity else accuracy_groups(run)
    figures: list[tuple[str, str, bytes]] = []
    if perplexity:
        figures.append(
            ("divergence", "Loss against budget; the dashed line is the full cache.", draw(divergence_figure, run))
        )
        if len(run.methods) > 1:
            figures.append(("course", "Divergence along the continuation.", draw(course_figure, run)))
    else:
        caption = (
            "Score against budget with 95 % confidence intervals; the dashed line and its band are the full cache. "
            "Points at one budget are set a little apart."
        )
        figures.append(("accuracy", caption, draw(accuracy_figure, run, groups)))
    if run.benchmark == "needle":
        figures.insert(0, ("needle", "Score of every cell of the grid, in percent.", draw(heatmap_figure, run)))
    figures.append(("resources", _resource_caption(run), draw(resource_figure, run)))
    for name, _, png in figures:
        (target / f"{prefix}{name}.png").write_bytes(png)
    return {
        "title": _TITLES.get(run.benchmark, run.benchmark),
        "name": run.name,
        "settings": run.settings,
        "commands": [shlex.join(command) for command in run.commands],
        "versions": run.versions,
        "figures": [(name, caption, base64.b64encode(png).decode("ascii")) for name, caption, png in figures],
        "methods": run.methods,
        "groups": groups,
        "totals": run.totals["methods"],
        "perplexity": perplexity,
        "resources": resource_table(run),
        "skipped": run.skipped,
        "rows": len(run.rows),
    }


def _resource_caption(run: RunData) -> str:
    if run.benchmark == "perplexity":
        return "Memory held after the prefix has been read."
    mode = "after" if run.settings.get("query_aware") else "before"
    return f"Memory and speed on the machine of this run; the context was compressed {mode} the question was read."
