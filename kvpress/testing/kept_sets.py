"""Kept sets against a method's formula: after every forward, every layer, KV head and batch row.

A test writes the method down once more, as a *rule*: from fp64 attention weights of a dense pass
(`kvpress.testing.dense`) to the positions that each KV head keeps. `KeptSets` feeds a model and compares. Rows are
judged one by one, without their padding and batch mates. A rule that follows the cache's own history may lean on it,
since every earlier kept set has been compared already.

Example:
    def rule(step):                                      # the last query's four favourites
        last = step.grouped()[:, -1]                     # [kv_heads, tokens]
        return [best(last[head], held, 4) for head, held in enumerate(step.held)]

    with KeptSets(model, PolicyCache(model, policy), rule) as sets:
        sets.feed(prompt)
        for token in continuation.T:
            sets.feed(token[:, None])
    assert sets.evicted
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.cache_argument import passed
from kvpress.testing.dense import Recording, Row, dense_copy, record, replay


@dataclass
class Step:
    """One forward of one batch row, as one layer saw it.

    Attributes:
        layer: index of the layer.
        weights: `[query_heads, new tokens, tokens]` fp64: the attention of this forward's rows.
        keys: `[kv_heads, tokens, dim]` fp64.
        tokens: every token id of the row so far.
        held: per KV head, ascending: the positions kept before, and the new ones.
        prompt: tokens of the row that came in prompts (forwards of more than one token).
        decoded: tokens since the last prompt.
        state: the rule's own, kept from step to step.
    """

    layer: int
    weights: Tensor
    keys: Tensor
    tokens: tuple[int, ...]
    held: list[list[int]]
    prompt: int
    decoded: int
    state: dict[str, Any]

    @property
    def seen(self) -> int:
        """Tokens of the row so far."""
        return len(self.tokens)

    def grouped(self) -> Tensor:
        """Weights averaged over the query heads of each KV head: `[kv_heads, new tokens, tokens]`."""
        grouped: Tensor = self.weights.unflatten(0, (len(self.held), -1)).mean(dim=1)
        return grouped


Rule = Callable[[Step], list[list[int]]]


def best(scores: Tensor, held: Iterable[int], count: int, protected: Iterable[int] = ()) -> list[int]:
    """The `count` positions of `held` to keep: `protected` ones first, then by score, of equal ones the later."""
    always = set(protected)
    order = sorted(held, key=lambda position: (position in always, float(scores[position]), position), reverse=True)
    return sorted(order[:count])


def snapkv_votes(step: Step, window: int, kernel_size: int, pooling: str = "max", reduce: str = "mean") -> list[Tensor]:
    """SnapKV's votes of each KV head, `[tokens]`: written down from the formula, earlier votes fading."""
    votes = []
    new = step.weights.shape[1]
    rows = min(new, window)
    for head, held in enumerate(step.held):
        group = step.weights.unflatten(0, (len(step.held), -1))[head, :, new - rows :].sum(dim=1)
        mass = {"mean": group.mean, "sum": group.sum}[reduce](dim=0) if reduce != "max" else group.amax(dim=0)
        if new > 1:
            prefix = [position for position in held if position < step.seen - window]
            raw = [float(mass[position]) for position in prefix]
            for index, position in enumerate(prefix):
                around = [index + offset for offset in range(-(kernel_size // 2), kernel_size // 2 + 1)]
                near = [raw[other] for other in around if 0 <= other < len(raw)]
                mass[position] = max(near) if pooling == "max" else sum(near) / kernel_size
        before = step.state.setdefault("votes", {}).get(head, torch.zeros(0, dtype=torch.float64))
        total = mass.clone()
        total[: len(before)] += (1 - rows / window) * before
        step.state["votes"][head] = total
        votes.append(total)
    return votes


class KeptSets:
    """Feeds a cache and compares what it keeps with a rule.

    Args:
        model: in fp64, so that the two ways agree far beyond the gaps between scores.
        cache: a `PolicyCache` of `model`.
        rule: the method's formula.

    Attributes:
        evicted: tokens that left some head: 0 means that nothing was tested.
        compared: kept sets compared.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, rule: Rule) -> None:
        self.model, self.cache, self.rule = model, cache, rule
        self.evicted = self.compared = 0
        self.kept: list[dict[int, list[list[int]]]] = []
        self._states: list[dict[int, dict[str, Any]]] = []
        self._counts: list[tuple[int, int]] = []
        self._dense = dense_copy(model)
        self._mask: Tensor | None = None
        self._told = Recording()

    def __enter__(self) -> Self:
        self._recorder = record(self.model, self.cache)
        self._told = self._recorder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.__exit__(kind, error, trace)

    def feed(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """One forward of `ids [batch, tokens]`; `mask` as long as `ids`, 0 for padding.

        Raises:
            AssertionError: a kept set, or a logit, is not what it must be.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        self._mask = mask if self._mask is None else torch.cat([self._mask, mask], dim=-1)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            self.model(
                input_ids=ids, attention_mask=self._mask, position_ids=positions, **passed(self.model, self.cache)
            )
        if not self._states:
            self.kept, self._states = [{} for _ in ids], [{} for _ in ids]
            self._counts = [(0, 0)] * len(ids)
        for index, row in enumerate(self._told.rows):
            new = int(mask[index].sum())
            prompt, decoded = self._counts[index]
            self._counts[index] = (prompt + new, 0) if ids.shape[1] > 1 else (prompt, decoded + new)
            if new:
                self._compare(index, row, new)

    def reorder(self, index: Tensor) -> None:
        """Beams: row `i` becomes what row `index[i]` was."""
        self.cache.reorder_cache(index)
        rows = index.tolist()
        self.kept = [copy.deepcopy(self.kept[row]) for row in rows]
        self._states = [copy.deepcopy(self._states[row]) for row in rows]
        self._counts = [self._counts[row] for row in rows]
        self._mask = None if self._mask is None else self._mask[index]

    def _compare(self, index: int, row: Row, new: int) -> None:
        dense = replay(self._dense, row)
        error = dense.error(row)
        if not error < 1e-8:
            raise AssertionError(f"row {index}: logits differ by {error} from the dense pass over what was kept")
        length = len(row.tokens)
        for layer in self._told.layers:
            held_before = self.kept[index].get(layer)
            heads = dense.keys[layer].shape[0]
            held = [
                [*(held_before[head] if held_before else []), *range(length - new, length)] for head in range(heads)
            ]
            step = Step(
                layer,
                dense.weights[layer][:, -new:],
                dense.keys[layer],
                row.tokens,
                held,
                *self._counts[index],
                self._states[index].setdefault(layer, {}),
            )
            expected = self.rule(step)
            kept = [
                [position for position in head if position >= 0]
                for head in self.cache.kept_positions(layer)[index].tolist()
            ]
            if kept != expected:
                raise AssertionError(
                    f"row {index}, layer {layer}, after {length} tokens ({new} new): "
                    f"kept {kept}, the rule keeps {expected}"
                )
            self.kept[index][layer] = kept
            self.evicted += sum(len(before) - len(after) for before, after in zip(held, kept, strict=True))
            self.compared += len(kept)
