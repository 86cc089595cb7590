"""How a command ends that cannot do what was asked: one line on standard error, and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

FAILED, BAD_INPUT, STOPPED = 1, 2, 130  # exit codes, beside 0


@contextmanager
def refusals(*refused: type[Exception], stopped: str = "stopped") -> Iterator[None]:
    """Turn a refused value or a missing library into exit code 2; a model that cannot be had, a tier of an offloaded cache that fails and a
    file that cannot be written into 1; Ctrl-C into 130.

    Args:
        refused: narrows what counts as refused, where any other `ValueError` or `OSError` would be a fault whose trace is wanted.
        stopped: what to say after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        typer.secho(stopped, err=True, fg="yellow")
        raise typer.Exit(STOPPED) from error
    except Exception as error:
        code = _exit_code(error, refused)
        if code is None:
            raise
        typer.secho(f"error: {_told(error)}", err=True, fg="red")
        raise typer.Exit(code) from error


def _exit_code(error: Exception, refused: tuple[type[Exception], ...]) -> int | None:
    """`None` for a fault. What it looks for is imported only now: nothing else need wait for it."""
    from kvpress.longbench.errors import MissingExtraError
    from kvpress.models.errors import ModelLoadError
    from kvpress.offload.errors import TierError

    if isinstance(error, refused or (ValueError, TypeError, MissingExtraError)):
        return BAD_INPUT
    failed = (ModelLoadError, TierError, *(() if refused else (OSError,)))
    return FAILED if isinstance(error, failed) else None


def _told(error: Exception) -> str:
    """What the system says of a file is put before its name."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{str(error.filename)!r}: {error.strerror}"
    return str(error)


def fail(sentences: list[str]) -> None:
    """Print each on standard error; exit code 1 if there is one."""
    for sentence in sentences:
        typer.secho(f"failed: {sentence}", err=True, fg="red")
    if sentences:
        raise typer.Exit(FAILED)


def note(sentence: str) -> None:
    """A remark on standard error."""
    typer.secho(f"note: {sentence}", err=True, fg="yellow")
