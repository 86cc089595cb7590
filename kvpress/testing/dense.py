"""The yardstick for any finite budget: one dense pass in fp64 under an explicit mask of what each token could see.

Nothing of the cache is used but what it says of itself, `cache.kept_positions(layer)`: `record` writes down, forward by forward, which
tokens were fed and which positions each layer and KV head had kept before; `replay` then runs the whole text once, without a cache,
through a copy of the model in fp64 whose attention is a plain softmax under that mask. If the logits agree, the cache attended to
exactly the tokens that it claims to keep, at the right positions.

Example:
    model = tiny_model("llama", dtype=torch.float64)
    cache = PolicyCache(model, "snapkv", budget=16, window=4)
    with record(model, cache) as recording:
        model.generate(ids, cache=cache, max_new_tokens=8)
    for row in recording.rows:
        assert row.evicted                                   # else nothing was tested
        assert replay(dense_copy(model), row).error(row) < 1e-9
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvpress.cache_argument import found

NAME = "dense_by_explicit_mask"


@dataclass(frozen=True, eq=False)
class Block:
    """The real tokens of one batch row in one forward.

    Attributes:
        start, stop: their positions in the row, padding not counted.
        kept: layer -> `[kv_heads, slots]` int64 positions kept before this forward, `-1` for no token.
        logits: `[n, vocabulary]`: of the last `n` of these tokens.
    """

    start: int
    stop: int
    kept: dict[int, Tensor]
    logits: Tensor


@dataclass(frozen=True, eq=False)
class Row:
    """One batch row: its real tokens, and the forwards that fed them. Immutable, since beams share their beginnings."""

    tokens: tuple[int, ...] = ()
    blocks: tuple[Block, ...] = ()

    @property
    def evicted(self) -> bool:
        """Whether some KV head had lost a token that a later one could have seen."""
        return any(
            bool(((positions >= 0).sum(dim=-1) < block.start).any())
            for block in self.blocks
            for positions in block.kept.values()
        )

    def mask(self, layer: int) -> Tensor:
        """`[kv_heads, tokens, tokens]` bool: row `i` sees column `j`."""
        heads = self.blocks[0].kept[layer].shape[0] if self.blocks else 1
        heads = max(heads, *(block.kept[layer].shape[0] for block in self.blocks))
        length = len(self.tokens)
        mask = torch.zeros(heads, length, length, dtype=torch.bool)
        for block in self.blocks:
            new = block.stop - block.start
            mask[:, block.start : block.stop, block.start : block.stop] = torch.ones(new, new).tril().bool()
            for head, positions in enumerate(block.kept[layer]):
                mask[head, block.start : block.stop, positions[positions >= 0]] = True
        return mask

    def fed(self, tokens: list[int], kept: dict[int, Tensor], logits: Tensor) -> Row:
        """This row after one more forward."""
        start = len(self.tokens)
        block = Block(start, start + len(tokens), kept, logits)
        return Row(self.tokens + tuple(tokens), (*self.blocks, block))

    def cropped(self, removed: int) -> Row:
        """This row without its last `removed` tokens."""
        length = len(self.tokens) - removed
        blocks = []
        for block in self.blocks:
            if block.start < length:
                lost = max(block.stop - length, 0)
                blocks.append(
                    Block(block.start, block.stop - lost, block.kept, block.logits[: len(block.logits) - lost])
                )
        return Row(self.tokens[:length], tuple(blocks))


@dataclass
class Recording:
    """What a cache was fed, and what it said that it kept.

    Attributes:
        rows: one history for each batch row of the cache, as it is now.
        seen: tokens fed to each row, padding included.
        layers: layers that are compressed.
    """

    rows: list[Row] = field(default_factory=list)
    seen: int = 0
    layers: list[int] = field(default_factory=list)

    def fork(self) -> Recording:
        """A recording that goes on from here, for a copy of the cache."""
        return Recording(list(self.rows), self.seen, list(self.layers))


@contextmanager
def record(model: PreTrainedModel, cache: Any, recording: Recording | None = None) -> Iterator[Recording]:
    """Watch `cache` serve `model` (forward hooks on the model, and the cache's own batch verbs), from where `recording` ended.

    Args:
        model: the model that will be called with `cache` (calls with another cache are not recorded).
        cache: has `kept_positions(layer)`, `crop`, `reorder_cache`, `batch_select_indices`, `batch_repeat_interleave`.
        recording: of an earlier turn; a new one otherwise.
    """
    told = Recording() if recording is None else recording
    told.layers = [index for index in range(len(cache.layers)) if _is_compressed(cache, index)]
    pending: list[tuple[Tensor, Tensor | None, dict[int, Tensor]]] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if found(kwargs) is not cache:
            return
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        held: Any = cache
        kept = {layer: held.kept_positions(layer).clone() for layer in told.layers}
        pending.append((ids, kwargs.get("attention_mask"), kept))

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if found(kwargs) is not cache:
            return
        ids, mask, kept = pending.pop()
        batch, length = ids.shape
        rows = told.rows or [Row()] * batch
        real = torch.ones(batch, length, dtype=torch.bool)
        if mask is not None:
            real = mask[:, told.seen : told.seen + length].bool()
        logits = output.logits.detach().clone()
        fed = []
        for index, row in enumerate(rows):
            own = {layer: _row(positions, index) for layer, positions in kept.items()}
            scored = logits[index][real[index][-logits.shape[1] :]]
            fed.append(row.fed(ids[index][real[index]].tolist(), own, scored))
        told.rows = fed
        told.seen += length

    def crop(tokens_to_remove: int) -> None:
        type(cache).crop(cache, tokens_to_remove)
        told.rows = [row.cropped(-tokens_to_remove) for row in told.rows]
        told.seen += tokens_to_remove

    def select(indices: Tensor) -> None:
        type(cache).batch_select_indices(cache, indices)
        told.rows = [told.rows[index] for index in indices.tolist()]

    def reorder(beam_idx: Tensor) -> None:
        type(cache).reorder_cache(cache, beam_idx)
        told.rows = [told.rows[index] for index in beam_idx.tolist()]

    def repeat(repeats: int) -> None:
        type(cache).batch_repeat_interleave(cache, repeats)
        told.rows = [row for row in told.rows for _ in range(repeats)]

    verbs = {
        "crop": crop,
        "batch_select_indices": select,
        "reorder_cache": reorder,
        "batch_repeat_interleave": repeat,
    }
    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    vars(cache).update(verbs)
    try:
        yield told
    finally:
        for hook in hooks:
            hook.remove()
        for verb in verbs:
            del vars(cache)[verb]


def _is_compressed(cache: Any, index: int) -> bool:
    try:
        cache.kept_positions(index)
    except ValueError:
        return False
    return True


def _row(positions: Tensor, index: int) -> Tensor:
    return positions[index] if positions.numel() else torch.empty(1, 0, dtype=torch.long)


@dataclass
class Replay:
    """The dense pass of one row.

    Attributes:
        logits: `[tokens, vocabulary]` fp64.
        weights: layer -> `[query_heads, tokens, tokens]` fp64 attention weights.
        keys: layer -> `[kv_heads, tokens, dim]` fp64 keys as attention read them.
    """

    logits: Tensor
    weights: dict[int, Tensor]
    keys: dict[int, Tensor]

    def error(self, row: Row) -> float:
        """Largest absolute difference from the logits that `row` recorded; `inf` where there is nothing to compare, or NaN."""
        errors = [
            (self.logits[block.stop - len(block.logits) : block.stop] - block.logits.double()).abs().max()
            for block in row.blocks
            if len(block.logits)
        ]
        if not errors:
            return float("inf")
        largest = float(torch.stack(errors).max())
        return float("inf") if largest != largest else largest


_running: ContextVar[tuple[dict[int, Tensor], Replay] | None] = ContextVar("dense_replay", default=None)


def dense_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` in fp64 for `replay`: plain softmax attention, no cache."""
    AttentionInterface.register(NAME, _dense_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    dense: PreTrainedModel = copy.deepcopy(model).double().eval()
    dense.set_attn_implementation(NAME)
    dense.set_experts_implementation("eager")  # the only one that computes in fp64
    return dense


def replay(dense: PreTrainedModel, row: Row, *, full: bool = False) -> Replay:
    """Run all tokens of `row` at once, each seeing what the mask shows.

    Args:
        dense: from `dense_copy`.
        row: from a `Recording`.
        full: ignore what was kept: the full cache, to measure how much eviction changed.
    """
    layers = row.blocks[0].kept
    masks = {layer: row.mask(layer) for layer in layers}
    if full:
        causal = torch.ones(len(row.tokens), len(row.tokens)).tril().bool()
        masks = {layer: causal.expand_as(mask) for layer, mask in masks.items()}
    result = Replay(torch.empty(0), {}, {})
    token = _running.set((masks, result))
    try:
        with torch.no_grad():
            ids = torch.tensor(row.tokens)[None]
            output = dense(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False)
    finally:
        _running.reset(token)
    result.logits = output.logits[0].double()
    return result


def _no_mask(**arguments: Any) -> None:
    return None


def _dense_attention(
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
) -> tuple[Tensor, Tensor]:
    running = _running.get()
    if running is None:
        raise RuntimeError("the dense copy serves replay() only")
    masks, result = running
    layer: int = module.layer_idx  # type: ignore[assignment]
    length, query_heads = query.shape[2], query.shape[1]
    owner: int | None = layer if layer in masks else None
    if owner is None and getattr(module, "is_kv_shared_layer", False) and not sliding_window:
        owner = max(index for index in masks if index < layer)  # reads the keys of the last full layer before it
    causal = torch.ones(length, length).tril().bool()
    if owner is not None:
        mask = masks[owner].repeat_interleave(query_heads // masks[owner].shape[0], dim=0)
    elif sliding_window:
        mask = causal & ~causal.tril(-sliding_window)
    else:
        mask = causal
    keys, values = (
        tensor[0].double().repeat_interleave(query_heads // tensor.shape[1], dim=0) for tensor in (key, value)
    )
    scores = query[0].double() @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        sink = s_aux.double().view(-1, 1, 1).expand(-1, length, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    result.weights[layer], result.keys[layer] = weights, key[0].double()
    return (weights @ values).transpose(0, 1)[None].to(query.dtype).contiguous(), weights[None]
