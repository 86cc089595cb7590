"""Options that `profile`, `fit` and `bench` share, as they stand in `--help`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

SETTINGS: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": "markdown", "add_completion": False}
CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"]}

Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policies",
        "--policy",
        "-p",
        help="Names separated by commas, each with its parameters as `name:parameter=value,…`; `all` is every policy; repeatable.",
    ),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        help="Tokens (1024), share of the prompt (0.25) or bytes (256MB), separated by commas; repeatable. "
        "Of a policy that selects: the tokens it attends to. Left out: 0.25.",
    ),
]
Contexts = Annotated[
    str, typer.Option("--contexts", "-c", help="Tokens of the prompt, separated by commas; 16k is 16 x 1,024.")
]
Chunk = Annotated[
    int | None, typer.Option("--chunk-size", min=1, help="Tokens of one forward of the prompt; left out: all of it.")
]
Stock = Annotated[bool, typer.Option("--stock/--no-stock", help="Measure the model's own cache and attention too.")]

DEFAULT_BUDGETS = ["0.25"]


def budgets_of(given: list[str] | None) -> list[str]:
    """What was given, else a quarter of the prompt."""
    return given or DEFAULT_BUDGETS
