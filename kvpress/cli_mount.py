"""Sub-commands that live in other modules, imported when they are called and not before."""

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class Mount:
    """Where a sub-command's `typer.Typer` is, as `"module:attribute"`, and the line that `--help` shows for it."""

    target: str
    summary: str


MOUNTS: dict[str, Mount] = {
    "profile": Mount(
        "kvpress.profiling.profile_command:app", "Measure memory and time, each policy in a fresh process."
    ),
    "fit": Mount(
        "kvpress.profiling.fit_command:app", "Find the longest context that fits into memory, without weights."
    ),
    "bench": Mount("kvpress.profiling.bench_command:app", "Time decoding against the stock cache, as ratios."),
    "eval": Mount("kvpress.longbench.cli_eval:app", "Measure accuracy: RULER, LongBench, needle, perplexity."),
    "report": Mount("kvpress.longbench.cli:report_app", "Make one HTML page of an evaluation's results."),
    "lm-eval": Mount("kvpress.longbench.cli:lm_eval_app", "Run lm-evaluation-harness on a model with a policy."),
}


class MountingGroup(TyperGroup):
    """A group that lists `MOUNTS` beside its own commands without importing them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *MOUNTS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        mount = MOUNTS.get(cmd_name)
        if mount is None:
            return super().get_command(ctx, cmd_name)
        return TyperCommand(cmd_name, help=mount.summary)  # stands in for the real one on the help page

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        asked = args[0]
        if not ctx.resilient_parsing and not asked.startswith("-") and self.get_command(ctx, asked) is None:
            near = difflib.get_close_matches(
                asked, self.list_commands(ctx), n=2
            )  # typer looks at its own commands alone
            hint = f" Did you mean {' or '.join(repr(item) for item in near)}?" if near else ""
            ctx.fail(f"No such command {asked!r}.{hint}")
        name, command, rest = super().resolve_command(ctx, args)
        return (name, load(MOUNTS[name]), rest) if name in MOUNTS else (name, command, rest)


def load(mount: Mount) -> Any:
    """Import the app of a mount and turn it into a command."""
    module, _, attribute = mount.target.partition(":")
    return typer.main.get_command(getattr(importlib.import_module(module), attribute))
