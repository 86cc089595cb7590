"""Where people look: results go to standard output, progress and errors to standard error."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

PIPED_WIDTH = 160


def output_console() -> Console:
    """A console on standard output. A pipe has no width, so tables get a fixed one instead of 80 columns."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)


def print_table(table: Table) -> None:
    """Print a table on standard output, no cell cut short: a pipe is as wide as need be; on a terminal that is too narrow each row
    becomes a few lines of `column  value`."""
    console = output_console()
    needed = sum(_width(column) + 3 for column in table.columns) + 1
    if needed <= console.width:
        console.print(table)
    elif not console.is_terminal:
        console.width = needed
        console.print(table)
    else:
        console.print(*_blocks(table), sep="\n", highlight=False)


def _width(column: Column) -> int:
    """The narrowest in which a column can be read: of its longest word, or line where it may not be wrapped."""
    texts = [_text(cell) for cell in (column.header, *column.cells)]
    parts = texts if column.no_wrap else [word for text in texts for word in text.split()]
    widest = max(map(len, parts), default=0)
    return widest if column.max_width is None else min(widest, column.max_width)


def _text(cell: object) -> str:
    return Text.from_markup(str(cell)).plain


def _blocks(table: Table) -> Iterator[str]:
    names = [_text(column.header) for column in table.columns]
    if table.title is not None:
        yield str(table.title)
    for row in zip(*(column.cells for column in table.columns), strict=True):
        yield ""
        for name, cell in zip(names, row, strict=True):
            yield f"{name:<{max(map(len, names))}}  {cell}"


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
