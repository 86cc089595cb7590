"""No cell of a printed table is cut short, however narrow the terminal."""

import sys

import pytest
from rich.console import Console
from rich.table import Table

from kvpress import console


def table() -> Table:
    made = Table(title="Lamps")
    made.add_column("name", no_wrap=True)
    for number in range(12):
        made.add_column(f"figure {number}", justify="right", no_wrap=True)
    made.add_row("[red]north lamp[/]", *(f"{number} and some more" for number in range(12)))
    made.add_row("south", *(f"{number} or less" for number in range(12)))
    return made


def cells(made: Table) -> list[str]:
    return [
        str(cell).replace("[red]", "").replace("[/]", "")
        for column in made.columns
        for cell in (column.header, *column.cells)
    ]


def test_a_pipe_is_as_wide_as_need_be(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(table())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) > console.PIPED_WIDTH and "…" not in "".join(lines)
    assert len(lines) == 7 and all(cell in "\n".join(lines) for cell in cells(table()))


@pytest.mark.parametrize("width", [20, 60, 300])
def test_a_terminal_that_is_too_narrow_shows_rows_as_blocks(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Console(file=sys.stdout, force_terminal=True, color_system=None, width=width)
    monkeypatch.setattr(console, "output_console", lambda: terminal)
    console.print_table(table())
    shown = capsys.readouterr().out
    assert "…" not in shown and "[red]" not in shown
    if width != 20:  # there even a pair is folded
        assert all(cell in shown for cell in cells(table()))
        assert max(map(len, shown.splitlines())) <= width
    assert ("figure 3   3 or less" in shown) == (width != 300)
    assert ("┃" in shown) == (width == 300)


def test_a_column_with_a_limit_needs_no_more_than_that(capsys: pytest.CaptureFixture[str]) -> None:
    made = Table()
    made.add_column("answer", no_wrap=True, max_width=10)
    made.add_row("long " * 100)
    console.print_table(made)
    assert max(map(len, capsys.readouterr().out.splitlines())) < 20
