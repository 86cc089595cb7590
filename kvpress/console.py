"""Where people look: results go to standard output, progress and errors to standard error."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PIPED_WIDTH = 160


def output_console() -> Console:
    """A console on standard output. A pipe has no width, so tables get a fixed one instead of 80 columns."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)


def write_json(value: object) -> None:
    """Print a value of JSON types on standard output, over several lines."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def error_console() -> Console:
    """A console on standard error."""
    return Console(file=sys.stderr, soft_wrap=True)


def progress_bar(*, remaining: bool = False) -> Progress:
    """A progress bar on standard error that is gone when done, and was never there when piped.

    `remaining` adds an estimate of the time left, for steps that are counted.
    """
    console = error_console()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        *([TextColumn("left:"), TimeRemainingColumn()] if remaining else []),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def step(description: str) -> Iterator[None]:
    """A bar with the time passed, for a step whose length nobody knows beforehand."""
    with progress_bar() as progress:
        progress.add_task(description, total=None)
        yield
