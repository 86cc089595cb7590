"""Memory and time against context, and throughput against batch size, as one figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvpress.longbench.report.style import FULL_COLOUR, colour_of, panels, shared_legend
from kvpress.profiling.candidates import STOCK
from kvpress.profiling.table import Row, above_start

Value = Callable[[Row], float | None]
DASHES = ("-", "--", ":")  # colours and markers repeat after eight lines


def profile_figure(rows: Sequence[Row]) -> Any:
    """Panels against context at the smallest batch, and, where there are several batch sizes, against batch at the longest context."""
    rows = [row for row in rows if "error" not in row]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    batches, contexts = sorted({row["batch"] for row in rows}), sorted({row["context"] for row in rows})
    first = [row for row in rows if row["batch"] == batches[0]]
    shown: list[tuple[str, str, Sequence[Row], Value]] = [
        ("KV cache held (MB)", "context", first, lambda row: row["kv_held_bytes"] / 1e6),
        ("Peak of prefill above start (MB)", "context", first, lambda row: _mega(above_start(row, "prefill"))),
        ("Peak of decoding above start (MB)", "context", first, lambda row: _mega(above_start(row, "decode"))),
        ("Time to first token (s)", "context", first, lambda row: row["first_token_seconds"]),
        ("Time per token (ms)", "context", first, lambda row: row["token_milliseconds"]),
    ]
    if len(batches) > 1:
        longest = [row for row in rows if row["context"] == contexts[-1]]
        shown.append(("Decoding (tokens/s)", "batch", longest, lambda row: row["decode"]["tokens_per_second"]))
    figure, all_axes = panels(len(shown))
    for axes, (title, field, chosen, value) in zip(all_axes, shown, strict=True):
        for label in labels:
            _line(axes, label, labels, [(row[field], value(row)) for row in chosen if row["label"] == label])
        ticks = contexts if field == "context" else batches
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [_written(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        highest = max((value(row) or 0 for row in chosen), default=0)
        axes.set_ylim(0, 1.08 * highest or 1)
        axes.set_xlabel("Context (tokens)" if field == "context" else f"Batch size, at {contexts[-1]:,} tokens")
        axes.set_title(title, loc="left")
    shared_legend(figure, all_axes[0])
    return figure


def _line(axes: Any, label: str, labels: Sequence[str], points: Sequence[tuple[float, float | None]]) -> None:
    known = sorted((place, value) for place, value in points if value is not None)
    others = [name for name in labels if name != STOCK]
    colour, marker = (FULL_COLOUR, "o") if label == STOCK else colour_of(label, others)
    dash = "-" if label == STOCK else DASHES[others.index(label) // 8 % len(DASHES)]
    axes.plot(
        [place for place, _ in known],
        [value for _, value in known],
        dash,
        color=colour,
        marker=marker,
        markersize=4,
        label=label,
    )


def _mega(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def _written(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
