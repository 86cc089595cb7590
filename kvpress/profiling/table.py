"""Results on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from kvpress.profiling.fit import Fit
from kvpress.profiling.quantities import written_bytes

Row = dict[str, Any]


def profile_table(rows: Sequence[Row]) -> Table:
    """One line a measurement; a failed one shows its sentence."""
    table = Table(title=f"Profile of {escape(str(rows[0]['model']))}" if rows else "Profile")
    table.add_column("cache", no_wrap=True)
    columns = (
        "context",
        "batch",
        "kept KV",
        "held KV",
        "of full",
        "prefill s",
        "first token s",
        "ms per token",
        "tokens/s",
    )
    for name in (*columns, "peak, prefill", "peak, decode"):
        table.add_column(name, justify="right", no_wrap=True)
    tiers = _add_tiers(table, rows)
    for row in rows:
        start = [escape(row["label"]), f"{row['context']:,}", str(row["batch"])]
        shown = ["[red]failed[/]"] if "error" in row else _measured(row) + [tier_bytes(row, tier) for tier in tiers]
        table.add_row(*start, *shown)
    return table


def _add_tiers(table: Table, rows: Sequence[Row]) -> list[str]:
    """Add a column for each tier that some cache had; returns their names."""
    tiers = tier_names(rows)
    for tier in tiers:
        table.add_column(f"{tier} tier", justify="right", no_wrap=True)
    return tiers


def tier_names(rows: Iterable[Row]) -> list[str]:
    """The tiers that some cache of `rows` had, the nearest first."""
    return list(dict.fromkeys(tier for row in rows for tier in row.get("tiers", {})))


def tier_bytes(row: Row, tier: str) -> str:
    """What lay in a tier at the end, as text."""
    return written_bytes(row["tiers"][tier]) if tier in row["tiers"] else "-"


def failures(rows: Iterable[Row]) -> list[str]:
    """A sentence for each failed measurement."""
    return [
        f"{row['label']} at {row['context']:,} tokens, batch {row['batch']}: {row['error']}"
        for row in rows
        if "error" in row
    ]


def _measured(row: Row) -> list[str]:
    held, full = row["kv_held_bytes"], row["kv_full_bytes"]
    return [
        written_bytes(row["kv_logical_bytes"]),
        written_bytes(held),
        f"{held / full:.0%}" if full else "-",
        f"{row['prefill']['seconds']:.2f}",
        _number(row["first_token_seconds"], ".2f"),
        _number(row["token_milliseconds"], ".1f"),
        _number(row["decode"]["tokens_per_second"], ".1f"),
        peak_above(row, "prefill"),
        peak_above(row, "decode"),
    ]


def above_start(row: Row, phase: str) -> int | None:
    """Bytes of a phase's peak above the memory before the prompt: of the CUDA device where there is one, else of the process."""
    kind = "cuda" if row["prefill"]["cuda_before_bytes"] is not None else "resident"
    before, peak = row["prefill"][f"{kind}_before_bytes"], row[phase][f"{kind}_peak_bytes"]
    return None if before is None or peak is None else peak - before


def peak_above(row: Row, phase: str) -> str:
    """`above_start` as text."""
    above = above_start(row, phase)
    return "-" if above is None else "+" + written_bytes(above)


def fit_table(fits: Sequence[Fit], title: str) -> Table:
    """One line a candidate."""
    table = Table(title=title)
    table.add_column("cache", no_wrap=True)
    for name in ("context that fits", "bound by", "KV cache", "weights", "activations (allowance)", "in all"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in fits:
        amounts = (found.kv_bytes, found.weights_bytes, found.activation_bytes, found.total_bytes)
        context = f"{found.context:,}" if found.context else "[red]none[/]"
        table.add_row(escape(found.label), context, found.bound_by, *map(written_bytes, amounts))
    return table


def bench_table(rows: Sequence[Row], title: str) -> Table:
    """One line a cache and context."""
    table = Table(title=title)
    table.add_column("cache", no_wrap=True)
    for name in ("context", "batch", "ms per token", "against stock", "held KV"):
        table.add_column(name, justify="right", no_wrap=True)
    tiers = _add_tiers(table, rows)
    for row in rows:
        start = [escape(row["label"]), f"{row['context']:,}", str(row["batch"])]
        if "error" in row:
            table.add_row(*start, "[red]failed[/]")
            continue
        figures = [f"{row['token_milliseconds']:.2f}", f"{row['speedup']:.2f}x", written_bytes(row["kv_held_bytes"])]
        table.add_row(*start, *figures, *(tier_bytes(row, tier) for tier in tiers))
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
