"""A progress bar on the terminal; nothing at all when the output is piped."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(total: int, *, done: int = 0, enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield a function that advances the bar by one and shows what is worked on."""
    console = Console(file=sys.stderr)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (enabled and console.is_terminal),
    ) as bar:
        task = bar.add_task("evaluating", total=total, completed=done)
        yield lambda description: bar.update(task, advance=1, description=description)
