"""Selected sets against a method's formula: one pass over the whole text in fp64, without a cache.

A test writes the method down once more, as a *chooser*: from queries and keys of a block of rows to the positions that each KV head
attends to. `oracle_pass` runs a copy of the model whose rotation is switched off, so that queries and keys arrive before rotation and
nothing has to be undone; it rotates them itself with the model's own module, to true positions or to ranks among the chosen tokens.

Example:
    oracle = oracle_pass(model, tokens, [[(0, 24)], [(24, 25)]], chooser, reindex=True)
    assert cache.selected_positions(layer)[0].tolist() == oracle.sets[layer][-1][0]
    assert (logits - oracle.logits).abs().max() < 1e-9
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "selection_oracle"
Sets = list[list[int]]


@dataclass
class Question:
    """What a chooser is asked: which tokens may rows `first … last - 1` of a layer attend to?

    Attributes:
        layer: index in the model.
        first, last: positions of the rows.
        decoding: a forward of a single token.
        query, keys: `[query_heads, rows, dim]` and `[kv_heads, last, dim]`, rotated to true positions.
        plain_query, plain_keys: before rotation.
        held: per KV head, ascending: what is there to attend to, the rows' own tokens included.
        rotate: `(tensor [heads, n, dim], positions [n])` to rotated, as in a text that ends at the largest of them.
        state: the chooser's own for this layer, kept from block to block.
        shared: the chooser's own for the whole pass.
    """

    layer: int
    first: int
    last: int
    decoding: bool
    query: Tensor
    keys: Tensor
    plain_query: Tensor
    plain_keys: Tensor
    held: Sets
    rotate: Callable[[Tensor, Tensor], Tensor]
    state: dict[str, Any]
    shared: dict[str, Any]


Chooser = Callable[[Question], Sets | None]  # positions per KV head, `None` for all that is held


@dataclass
class OraclePass:
    """The pass over one text.

    Attributes:
        logits: `[tokens, vocabulary]` fp64.
        sets: layer -> for each block, positions per KV head.
        narrowed: blocks in which some KV head attended to less than it held: 0 means that nothing was tested.
        states: layer -> the chooser's state at the end.
    """

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    sets: dict[int, list[Sets]] = field(default_factory=dict)
    narrowed: int = 0
    states: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Running:
    blocks: list[tuple[int, int, bool, int]]  # first, last, decoding, forward
    choose: Chooser
    reindex: bool
    held: Sequence[dict[int, Sets]] | None
    apply: Callable[..., tuple[Tensor, Tensor]]
    rotary: torch.nn.Module
    typed: bool
    result: OraclePass
    shared: dict[str, Any]


_running: ContextVar[_Running | None] = ContextVar("selection_oracle", default=None)


def oracle_pass(
    model: PreTrainedModel,
    tokens: Sequence[int],
    forwards: Sequence[Sequence[tuple[int, int]]],
    choose: Chooser,
    *,
    reindex: bool,
    held: Sequence[dict[int, Sets]] | None = None,
) -> OraclePass:
    """Logits and sets of a text that is fed in `forwards`.

    Args:
        model: any; a copy in fp64 is used.
        tokens: ids of one row, without padding.
        forwards: for each forward the blocks of rows `(first, past the last)` that select together.
        choose: the method.
        reindex: attention runs over ranks among the chosen tokens instead of true positions.
        held: for each forward, layer -> what each KV head kept before it; `None`: everything.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    oracle: Any = copy.deepcopy(model).double()
    oracle.eval()
    oracle.set_attn_implementation(NAME)
    oracle.set_experts_implementation("eager")
    decoder = oracle.get_decoder()
    module: Any = sys.modules[type(decoder).__module__]
    apply = module.apply_rotary_pos_emb
    blocks = [
        (first, last, len(forward) == 1 and last - first == 1, index)
        for index, forward in enumerate(forwards)
        for first, last in forward
    ]
    result = OraclePass()
    typed = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    rotary = type(decoder.rotary_emb)(
        decoder.config
    )  # frequencies may follow the longest text that the model's own has seen
    running = _Running(blocks, choose, reindex, held, apply, rotary, typed, result, {})
    token = _running.set(running)
    module.apply_rotary_pos_emb = lambda query, key, *args, **kwargs: (query, key)
    try:
        with torch.no_grad():
            ids = torch.tensor([list(tokens)])
            positions = torch.arange(ids.shape[1])[None]
            result.logits = oracle(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    finally:
        module.apply_rotary_pos_emb = apply
        _running.reset(token)
    return result


def _no_mask(**arguments: Any) -> None:
    return None


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    running = _running.get()
    if running is None:
        raise RuntimeError("the oracle's copy serves oracle_pass() only")
    plain_query, plain_keys, values = query[0], key[0], value[0]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = "sliding_attention" if sliding_window else "full_attention"

    def rotate(tensor: Tensor, positions: Tensor) -> Tensor:
        fresh = copy.deepcopy(running.rotary)
        extra = {"layer_type": kind} if running.typed else {}
        cos, sin = fresh(tensor, torch.arange(int(positions.max()) + 1)[None], **extra)
        rotated, _ = running.apply(tensor[None], tensor[None], cos[:, positions], sin[:, positions])
        return rotated[0]

    length, query_heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
    everywhere = torch.arange(length)
    true_query, true_keys = rotate(plain_query, everywhere), rotate(plain_keys, everywhere)
    output = torch.zeros(query_heads, length, value.shape[-1], dtype=value.dtype)

    def attend(head: int, rows: Tensor, at: Tensor, query: Tensor, keys: Tensor, visible: Tensor) -> None:
        scores = query @ keys.T * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[head].double().expand(len(rows), 1)], dim=-1)
        weights = scores.softmax(dim=-1)[:, : len(at)]
        output[head, rows] = weights @ values[head * kv_heads // query_heads, at]

    if sliding_window:
        visible = torch.ones(length, length).tril().bool() & ~torch.ones(length, length).tril(-sliding_window).bool()
        for head in range(query_heads):
            keys = true_keys[head * kv_heads // query_heads]
            attend(head, everywhere, everywhere, true_query[head], keys, visible)
        return output.transpose(0, 1)[None].contiguous(), None

    layer: int = module.layer_idx  # type: ignore[assignment]
    state = running.result.states.setdefault(layer, {})
    start = 0
    for number, (first, last, decoding, forward) in enumerate(running.blocks):
        start = first if number == 0 or running.blocks[number - 1][3] != forward else start
        before = [list(range(start))] * kv_heads if running.held is None else running.held[forward][layer]
        held = [[*(p for p in before[h] if p < start), *range(start, last)] for h in range(kv_heads)]
        question = Question(
            layer, first, last, decoding, true_query[:, first:last], true_keys[:, :last], plain_query[:, first:last],
            plain_keys[:, :last], held, rotate, state, running.shared,
        )  # fmt: skip
        chosen = running.choose(question)
        sets = held if chosen is None else [sorted(chosen[h]) for h in range(kv_heads)]
        running.result.narrowed += any(len(s) < len(h) for s, h in zip(sets, held, strict=True))
        running.result.sets.setdefault(layer, []).append(sets)
        rows = torch.arange(first, last)
        for head in range(query_heads):
            owner = head * kv_heads // query_heads
            at = torch.tensor(sets[owner])
            visible = at[None] <= rows[:, None]
            if running.reindex:
                ranks = torch.searchsorted(at, rows)
                together = rotate(
                    torch.cat([plain_query[head, rows], plain_keys[owner, at]])[None],
                    torch.cat([ranks, torch.arange(len(at))]),
                )[0]
                attend(head, rows, at, together[: len(rows)], together[len(rows) :], visible)
            else:
                attend(head, rows, at, true_query[head, rows], true_keys[owner, at], visible)
    return output.transpose(0, 1)[None].contiguous(), None
