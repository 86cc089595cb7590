"""Options that `profile`, `fit` and `bench` share, as they stand in `--help`, and how a refusal leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from kvpress.cli import BAD_INPUT, FAILED, refusals

STOPPED = 130
SETTINGS: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": "markdown"}
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
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

DEFAULT_BUDGETS = ["0.25"]


def budgets_of(given: list[str] | None) -> list[str]:
    """What was given, else a quarter of the prompt."""
    return given or DEFAULT_BUDGETS


@contextmanager
def refused() -> Iterator[None]:
    """As `kvpress.cli.refusals`; a library that is missing is refused as well."""
    from kvpress.longbench.errors import MissingExtraError

    try:
        with refusals():
            yield
    except MissingExtraError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(BAD_INPUT) from error


def fail(sentences: list[str]) -> None:
    """Print each on standard error; exit code 1 if there is one."""
    for sentence in sentences:
        typer.secho(f"failed: {sentence}", err=True, fg="red")
    if sentences:
        raise typer.Exit(FAILED)


def note(sentence: str) -> None:
    """A remark on standard error."""
    typer.secho(f"note: {sentence}", err=True, fg="yellow")
