"""`kvpress fit`."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpress.cli_options import DtypeOption, JsonOption, KvDtypeOption, ModelOption
from kvpress.cli_refusals import fail, note, refusals
from kvpress.profiling.options import CONTEXT, SETTINGS, Budgets, Chunk, Policies, Stock, budgets_of

app = typer.Typer(**SETTINGS)

Memory = Annotated[str, typer.Option("--memory", help="All there is: 8GB (10^9), 24GiB (2^30).")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to be generated after the prompt.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Rows at once.")]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Bytes of the weights; left out: dense, in the model's dtype.")
]
Activations = Annotated[
    str | None,
    typer.Option("--activations", help="Bytes left for activations; left out: an allowance from the model's widths."),
]


@app.command(
    context_settings=CONTEXT,
    epilog="Examples: `kvpress fit --memory 8GB` · `kvpress fit -m ./my-model --memory 24GiB --dtype bfloat16 -p snapkv,quest -b 4096`"
    " · `kvpress fit --memory 16GB --batch 8 --chunk-size 2048 --kv-dtype int8 --json`",
)
def fit(
    memory: Memory,
    model: ModelOption = "smollm2",
    policies: Policies = None,
    budget: Budgets = None,
    new_tokens: NewTokens = 256,
    batch: Batch = 1,
    chunk_size: Chunk = None,
    weights: Weights = None,
    activations: Activations = None,
    stock: Stock = True,
    dtype: DtypeOption = None,
    kv_dtype: KvDtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """The longest prompt that fits into memory, with every policy, from the model's configuration alone.

    Weights and cache are computed exactly (the cache of adakv within 3 %). What a forward needs besides is an allowance: it grows with
    the tokens of one forward, so --chunk-size lowers it. What the interpreter and the GPU's runtime take is not counted.
    """
    with refusals():
        from kvpress.models.load import parse_dtype
        from kvpress.policies.budget import parse_bytes
        from kvpress.profiling.candidates import make_candidates
        from kvpress.profiling.configuration import load_config
        from kvpress.profiling.fit import Room
        from kvpress.profiling.fit import fit as find_fit
        from kvpress.profiling.quantities import written_bytes
        from kvpress.profiling.shape import read_shape

        room = Room(
            parse_bytes(memory, field="memory"),
            new_tokens,
            batch,
            chunk_size,
            None if weights is None else parse_bytes(weights, field="weights"),
            None if activations is None else parse_bytes(activations, field="activations"),
        )
        candidates = make_candidates(policies or ["all"], budgets_of(budget), stock=stock, kv_dtype=kv_dtype)
        shape = read_shape(load_config(model), parse_dtype(dtype))
        fits = [find_fit(shape, candidate, room) for candidate in candidates]
    if shape.quantized and weights is None:
        note("the checkpoint's weights are quantized; they are counted as dense ones. Give --weights")
    from kvpress.console import print_table, write_json

    if as_json:
        facts = {"model": model, "dtype": str(shape.dtype).removeprefix("torch."), "memory_bytes": room.memory}
        settings = {"new_tokens": new_tokens, "batch": batch, "chunk_size": chunk_size, "kv_dtype": kv_dtype}
        write_json({**facts, **settings, "fits": [found.to_dict() for found in fits]})
    else:
        from kvpress.profiling.table import fit_table

        title = f"What fits in {written_bytes(room.memory)}: {model}, {shape.dtype}, batch {batch}, {new_tokens:,} new tokens"
        print_table(fit_table(fits, title))
    if not any(found.context for found in fits):
        fail(
            [
                f"nothing fits in {written_bytes(room.memory)}: the weights alone take {written_bytes(fits[0].weights_bytes)}"
            ]
        )
