"""Bytes that a cache will hold, from the sizes of the model and the policy's own rules."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from kvpress.assembly import Policies
from kvpress.kernels.pages.rounding import bounds_type
from kvpress.memory import table_growth
from kvpress.policies.base import EvictionPolicy
from kvpress.policies.budget import Budget, layer_budgets
from kvpress.policies.quest import Quest
from kvpress.policies.selection import SelectionPolicy
from kvpress.policies.tokenselect import TokenSelect
from kvpress.profiling.shape import LayerShape, ModelShape
from kvpress.row_format import RowFormat, row_format

NUMBER = torch.long.itemsize  # of a slot's index
COLUMN = torch.float32.itemsize
POSITION = torch.int32.itemsize
FIXED = 6  # numbers a KV head that a layer sets aside when it divides a budget of bytes
LONGEST_HEAD = 1.5  # the longest against the mean, of heads that share a budget by what they see


def stock_bytes(shape: ModelShape, prompt: int, decoded: int, batch: int = 1) -> int:
    """Bytes that transformers' own cache holds after a prompt in one piece and `decoded` further tokens."""
    return sum(_stock_layer(shape, layer, prompt, decoded, batch) for layer in shape.layers)


def policy_bytes(
    shape: ModelShape, policies: Policies, prompt: int, decoded: int, batch: int = 1, kv_dtype: str | None = None
) -> int:
    """`PolicyCache.nbytes` after a prompt in one piece and `decoded` further tokens: keys and values, columns, and all else.

    Exact up to the 16 bytes a KV head that a layer may note where no native kernel writes its slots, but for policies that share a budget
    among heads by what they see: for those the longest head is taken to be 1.5 times the mean, which concerns the columns alone.

    Args:
        prompt: tokens of each batch row, padding excluded.
        decoded: tokens fed after it.
        kv_dtype: how keys and values are stored.

    Raises:
        ValueError: a policy whose memory follows the text (SepLLM with `separators=None`), or a budget of bytes too small for a token.
    """
    policy, total, ordinal = policies.eviction, 0, 0
    if policy.recounts:
        raise ValueError(f"what {policy.name} holds depends on the text when its budget has no bound, got {policy!r}")
    for layer in shape.layers:
        if not layer.compressed:
            total += _stock_layer(shape, layer, prompt, decoded, batch)
            continue
        total += _Layer(shape, layer, policies, ordinal, batch, row_format(kv_dtype)).held(prompt, decoded)
        ordinal += 1
    return total


def _stock_layer(shape: ModelShape, layer: LayerShape, prompt: int, decoded: int, batch: int) -> int:
    tokens = prompt + decoded
    if layer.window is not None and decoded:  # a prompt's storage stays whole until the next token
        tokens = min(tokens, layer.window)
    return batch * (tokens * layer.token_bytes(shape.dtype.itemsize) + layer.state_bytes)


class _Layer:
    """One compressed layer."""

    def __init__(
        self, shape: ModelShape, layer: LayerShape, policies: Policies, ordinal: int, batch: int, form: RowFormat
    ) -> None:
        self.shape, self.layer, self.batch, self.ordinal = shape, layer, batch, ordinal
        self.policy: EvictionPolicy = policies.eviction
        self.selection = policies.selection
        self.shared = policies.eviction.heads_agree
        self.layers = len(shape.compressed)
        self.heads = batch * layer.kv_heads
        row_bytes = (form.row_bytes(dim, shape.dtype) for dim in (layer.key_dim, layer.value_dim))
        self.kv = batch * layer.kv_heads * sum(row_bytes)
        self.columns = self.heads * (POSITION + COLUMN * len(self.policy.columns))
        self.columns_once = self.columns - (self.heads - batch) * POSITION  # heads share positions until an eviction

    def held(self, prompt: int, decoded: int) -> int:
        """Bytes after the prompt and the decoded tokens."""
        budgets = self._budgets(prompt)
        slack = self.policy.interval - 1
        seen = prompt + decoded
        if budgets is None or seen <= min(budgets) + slack:
            limit = None if budgets is None else max(budgets) + self.policy.interval
            slots, slots_in_use = grown_slots(prompt, decoded, limit), seen
            table = slots * (self.kv + self.columns_once)
        elif min(budgets) == max(budgets) and not self._by_need(prompt, budgets[0]):
            slots = slots_in_use = budgets[0] + self.policy.interval
            spare = self.heads * NUMBER if self.policy.interval == 1 else 0
            table = slots * (self.kv + self.columns) + spare
        else:
            slots_in_use, table = self._ragged(budgets, prompt)
        return table + self._recent() + self._selected(slots_in_use, decoded)

    def _budgets(self, prompt: int) -> list[int] | None:
        """Tokens that each KV head keeps, or `None` for all."""
        if self.policy.budget is None:
            return None
        fixed = self.layers * (FIXED * self.heads * NUMBER + self._recent())
        resolved = [
            budget.resolve([prompt], self.layers * (self.kv + self.columns), fixed, spare=self.policy.interval)
            for budget in layer_budgets(self.policy.budget, self.ordinal, self.layers)
        ]
        if len(resolved) > 1:
            return [max(1, budget[0]) for budget in resolved]
        given: Sequence[Any] = resolved[0]
        if self.policy.shares_out == "layers":  # by the length of the prompt alone
            facts: Any = SimpleNamespace(seen=(prompt,), ordinal=self.ordinal, layers=self.layers)
            given = self.policy.allocate(facts, resolved[0])
        return [max(1, int(given[0]))] * self.layer.kv_heads

    def _by_need(self, prompt: int, budget: int) -> bool:
        """Whether the heads of this layer share a budget by what they see."""
        return self.policy.shares_out == "heads" and self.layer.kv_heads > 1 and prompt > budget

    def _ragged(self, budgets: list[int], prompt: int) -> tuple[int, int]:
        """Slots of the longest head, and bytes of the table."""
        room = self.policy.interval
        mean = sum(budgets) / len(budgets) + room
        longest = max(budgets) + room
        if min(budgets) == max(budgets):
            longest = min(int(LONGEST_HEAD * mean), prompt + room)
        index = 5 * NUMBER + longest  # starts, lengths, spare, two limits; a byte a slot for what lies outside
        table = int(mean * self.kv) + longest * self.columns + self.heads * index
        size = None if isinstance(self.policy.budget, tuple) else Budget.parse(self.policy.budget or 1).size
        if (
            size is not None
        ):  # heads get so much less that the longest one's columns fit too; half a slot is what rounding leaves
            table = min(table, size // self.layers - self._recent() - (self.kv + self.columns) // 2)
        return longest, table

    def _recent(self) -> int:
        window, heads = self.policy.recent_queries, self.shape.expanded_heads or self.layer.kv_heads
        return self.batch * window * (heads * self.shape.query_dim * self.shape.dtype.itemsize + POSITION)

    def _selected(self, slots: int, decoded: int) -> int:
        return 0 if self.selection is None or not decoded else self._selection_bytes(self.selection, slots)

    def _selection_bytes(self, selection: SelectionPolicy, slots: int) -> int:
        item = self.shape.dtype.itemsize
        if isinstance(selection, Quest) and self.ordinal >= selection.skip_layers and slots > selection.top_k:
            bound = bounds_type(self.shape.dtype).itemsize
            return 2 * self.heads * -(-slots // selection.page_size) * self.layer.key_dim * bound
        if isinstance(selection, TokenSelect) and slots > selection.sinks + selection.top_k + selection.local:
            in_order = (
                self.policy.budget is None
            )  # slots are positions, and the vote's query is turned by one prepared call
            chosen = (
                selection.top_k * (1 if self.shared else self.layer.kv_heads) * (NUMBER + POSITION * (not in_order))
            )
            turn = 2 * self.shape.query_dim * torch.float32.itemsize if in_order and selection.reindexes else 0
            return self.batch * (self.shape.query_heads * self.shape.query_dim * item + chosen + 1) + turn
        return 0


def grown_slots(prompt: int, decoded: int, limit: int | None) -> int:
    """Slots of a table that took a prompt and then one token after another, and evicted none."""

    def roomy(count: int) -> int:
        slots = count + table_growth(count)
        return slots if limit is None or limit < count else min(slots, limit)

    slots = roomy(prompt)
    for count in range(prompt + 1, prompt + decoded + 1):
        if count > slots:
            slots = roomy(count)
    return slots
