"""`kvpress report` and `kvpress lm-eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress.cli_refusals import refusals

# Every argument goes to the harness as it stands, --help included.
_PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

report_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
lm_eval_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@report_app.command(epilog="Examples: `kvpress report results/ruler` · `kvpress report results --markdown`")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of several runs.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Left out: report/ inside the folder.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables in Markdown and write nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print settings and totals of each run as JSON and write nothing.")
    ] = False,
) -> None:
    """One self-contained HTML page, and its figures as PNG files."""
    with refusals():
        if markdown and as_json:
            raise ValueError("markdown and json must not be asked for at once")
        if markdown:
            from .report.markdown import markdown_tables

            typer.echo(markdown_tables(folder))
        elif as_json:
            from kvpress.console import write_json

            from .report.load import load_runs

            write_json(
                [{"name": run.name, "settings": run.settings, "totals": run.totals} for run in load_runs(folder)]
            )
        else:
            from .report import make_report

            typer.echo(str(make_report(folder, output)))


@lm_eval_app.command(context_settings=_PASSED_ON)
def lm_eval(context: typer.Context) -> None:
    """The command line of lm-evaluation-harness, with the model "kvpress": --model_args policy=snapkv,budget=0.25,…"""
    with refusals():
        from .harness import main

        main(context.args)
