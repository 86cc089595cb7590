"""Totals as a table on the terminal."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from kvpress.console import output_console, print_table
from kvpress.profiling.quantities import written_bytes


def print_totals(totals: dict[str, Any]) -> None:
    """Print averages of scores by method, or perplexities, on standard output."""
    methods = totals["methods"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    if any("perplexity" in entry for entry in methods.values()):
        for name in ("method", "perplexity", "ratio", "KL (nats)", "agreement %", "memory %"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for method, entry in methods.items():
            table.add_row(
                escape(method),
                f"{entry['perplexity']:.3f}",
                f"{entry.get('ratio', float('nan')):.4f}",
                f"{entry['kl']:.5f}",
                f"{entry['agreement']:.1f}",
                f"{100 * entry['memory_share']:.1f}",
            )
    else:
        groups = sorted({group for entry in methods.values() for group in entry["groups"]})
        for name in ("group", *methods):
            table.add_column(escape(name), justify="left" if name == "group" else "right")
        for group in groups:
            table.add_row(escape(group), *(_cell(entry["groups"].get(group)) for entry in methods.values()))
    print_table(table)
    for method, entry in methods.items():
        if "tiers" in entry:
            tiers = ", ".join(f"{name} {written_bytes(nbytes)}" for name, nbytes in entry["tiers"].items())
            output_console().print(
                f"{method}: mean bytes in tiers: {tiers}", highlight=False, markup=False, soft_wrap=True
            )


def _cell(entry: dict[str, Any] | None) -> str:
    return f"{entry['score']:.1f} ({entry['lower']:.0f}-{entry['upper']:.0f})" if entry else "-"
