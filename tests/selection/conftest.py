"""Feeding a cache forward by forward, and the same text through the oracle's pass."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpress import PolicyCache
from kvpress.testing.families import VOCABULARY, tiny_model
from kvpress.testing.selected_sets import OraclePass, oracle_pass

sys.path.insert(0, str(Path(__file__).parent))  # choosers of other files here
torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)


def distinct_tokens(batch: int, count: int, seed: int = 1) -> Tensor:
    """`[batch, count]` ids, no two of a row alike: equal tokens have equal keys before rotation, and would tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCABULARY - 3, generator=generator)[:count] + 3 for _ in range(batch)])


@dataclass
class Fed:
    """What a cache gave.

    Attributes:
        logits: for each batch row, `[real tokens, vocabulary]`.
        selected: for each forward, layer -> `selected_positions`.
        held: for each forward, batch row and layer: what each KV head kept before it.
    """

    cache: Any
    ids: Tensor
    mask: Tensor
    cuts: list[tuple[int, int]]
    logits: list[Tensor] = field(default_factory=list)
    selected: list[dict[int, Tensor]] = field(default_factory=list)
    held: list[list[dict[int, list[list[int]]]]] = field(default_factory=list)

    def tokens(self, row: int) -> list[int]:
        return self.ids[row][self.mask[row].bool()].tolist()

    def sets(self, forward: int, layer: int, row: int) -> list[list[int]]:
        """Positions per KV head, or one list where heads share."""
        positions = self.selected[forward][layer][row]
        heads = positions[None] if positions.dim() == 1 else positions
        return [[position for position in head.tolist() if position >= 0] for head in heads]

    def forwards(self, row: int, blocks: Callable[[int], list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
        """Blocks of positions of each forward that has tokens of this row."""
        result, start = [], 0
        for first, last in self.cuts:
            count = int(self.mask[row, first:last].sum())
            cut = blocks(count) if count > 1 else [(0, count)] * (count == 1)
            result.append([(start + a, start + b) for a, b in cut])
            start += count
        return result


def feed_forwards(model: Any, cache: PolicyCache, ids: Tensor, sizes: Sequence[int], mask: Tensor | None = None) -> Fed:
    mask = torch.ones_like(ids) if mask is None else mask
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    fed = Fed(cache, ids[:, : ends[-1]], mask[:, : ends[-1]], list(pairwise(ends)))
    layers = [layer.layer_idx for layer in cache.policy_layers]
    config = model.config.get_text_config()
    rows = [[] for _ in ids]
    for first, last in fed.cuts:
        kept = {layer: cache.kept_positions(layer) for layer in layers}
        fed.held.append(
            [
                {
                    layer: [[p for p in head.tolist() if p >= 0] for head in positions[row]]
                    if positions.numel()
                    else [[]] * getattr(config, "num_key_value_heads", config.num_attention_heads)
                    for layer, positions in kept.items()
                }
                for row in range(len(ids))
            ]
        )
        seen = fed.mask[:, :last]
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, first:last]
        with torch.no_grad():
            out = model(
                input_ids=fed.ids[:, first:last], attention_mask=seen, position_ids=positions, past_key_values=cache
            )
        for row in range(len(ids)):
            rows[row].append(out.logits[row][fed.mask[row, first:last].bool()])
        if cache.policy_layers[0].reader is not None:
            fed.selected.append({layer: cache.selected_positions(layer) for layer in layers})
    fed.logits = [torch.cat(parts) for parts in rows]
    return fed


@pytest.fixture
def feed():
    return feed_forwards


@dataclass
class Compared:
    oracles: list[OraclePass]
    error: float
    sets: int
    narrowed: int


@pytest.fixture
def compare():
    """`compare(model, policies, chooser, blocks, reindex=…)`: logits and sets of every row and forward against the oracle."""

    def compare(
        model,
        policies,
        make_chooser,
        *,
        blocks=None,
        reindex=False,
        batch=1,
        pads=(),
        sizes=(40, *[1] * 12),
        seed=1,
        held=False,
    ) -> tuple[Fed, Compared]:
        ids = distinct_tokens(batch, sum(sizes), seed=seed)
        mask = torch.ones_like(ids)
        for row, count in enumerate(pads):
            mask[row, :count] = 0
        cache = PolicyCache(model, policies)
        fed = feed_forwards(model, cache, ids, sizes, mask)
        blocks = blocks or (lambda rows: [(0, rows)])
        oracles, error, sets = [], 0.0, 0
        for row in range(batch):
            forwards = fed.forwards(row, blocks)
            kept = [each[row] for each in fed.held] if held else None
            oracle = oracle_pass(model, fed.tokens(row), forwards, make_chooser(), reindex=reindex, held=kept)
            error = max(error, float((oracle.logits - fed.logits[row]).abs().max()))
            for layer, per_block in oracle.sets.items():
                numbers = torch.tensor([len(forward) for forward in forwards]).cumsum(0).tolist()
                for forward, number in enumerate(numbers if fed.selected else []):
                    if not forwards[forward]:
                        continue
                    got = fed.sets(forward, layer, row)
                    want = per_block[number - 1]
                    if len(got) == 1:
                        assert all(head == want[0] for head in want)
                        want = want[:1]
                    assert got == want, f"row {row}, layer {layer}, forward {forward}"
                    sets += 1
            oracles.append(oracle)
        return fed, Compared(oracles, error, sets, min(oracle.narrowed for oracle in oracles))

    return compare


@pytest.fixture
def llama():
    return tiny_model("llama", dtype=torch.float64)
