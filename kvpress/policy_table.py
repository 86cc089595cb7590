"""The registered policies as a table: for the terminal, for the README, as JSON."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from kvpress.policies import describe_policies

COLUMNS = ("name", "class", "kind", "keeps", "parameters", "needs", "source")


def budget_options(name: str, tokens: int) -> dict[str, int]:
    """The parameter by which a policy is told to keep, or to attend to, `tokens` tokens.

    Empty for a policy that takes no such number, and for a name that is not registered.
    """
    parameters = next((row.parameters for row in describe_policies() if row.name == name), {})
    if parameters.get("budget") == "required":
        return {"budget": tokens}
    return {"top_k": tokens} if "top_k" in parameters else {}


def policy_rows() -> list[tuple[str, ...]]:
    """One row of strings per policy, in the order of `COLUMNS`."""
    return [
        (row.name, row.class_name, row.kind, row.summary, written(row.parameters), row.needs, row.paper)
        for row in describe_policies()
    ]


def written(parameters: dict[str, Any]) -> str:
    """`budget, window=32`: parameters as one would pass them."""
    return ", ".join(name if value == "required" else f"{name}={value!r}" for name, value in parameters.items())


def policies_json() -> list[dict[str, Any]]:
    """One object per policy; a parameter without a default has the value "required"."""
    return [asdict(row) for row in describe_policies()]


def policies_markdown() -> str:
    """The table of the README."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in policy_rows():
        name, class_name, kind, keeps, parameters, needs, source = (cell.replace("|", "\\|") for cell in row)
        lines.append(f"| `{name}` | `{class_name}` | {kind} | {keeps} | `{parameters}` | {needs} | {source} |")
    return "\n".join(lines)


def policies_rich() -> Table:
    """The table of the terminal."""
    table = Table(title="Policies")
    for column in COLUMNS:
        table.add_column(column, no_wrap=column in ("name", "class", "kind"))
    for row in policy_rows():
        table.add_row(*row)
    return table
