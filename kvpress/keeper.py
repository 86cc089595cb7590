"""Keeper: what of a layer's tokens stays after each forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from kvpress.eviction import ranked, strongest, survivors
from kvpress.forward import Forward
from kvpress.memory import held_bytes
from kvpress.observation import AttentionArguments, Observation
from kvpress.policies.budget import layer_budgets
from kvpress.reading import Reader
from kvpress.recent_queries import RecentQueries
from kvpress.slots import SlotTable
from kvpress.tensor_parallel import ALONE

if TYPE_CHECKING:
    from kvpress.policies.base import EvictionPolicy


_FACTS = ("prompt_rows", "budgets", "evictions", "decoded")


class Keeper:
    """Lets the policy observe each forward of one layer, and evicts what exceeds the budget.

    Args:
        policy: what stays.
        layer_idx: index of the layer in the model.
        ordinal: index among the compressed layers.
        layers: number of compressed layers.
        expands_keys: the model makes other keys of the table's before it attends (latents).
        reader: where slots are selected, or positions re-indexed.

    Attributes:
        budgets: tokens to keep, `[batch, kv_heads]`, `None` before the first prompt.
        prompt_rows: real tokens of each batch row that came in prompts.
        decoded: tokens since the last prompt.
        evictions: tokens that left the KV head that lost most.
        recent: the last query rows, where the policy asks for them.
        heads: the share of the model's heads that this process holds.
    """

    heads = ALONE

    def __init__(
        self,
        policy: EvictionPolicy,
        layer_idx: int,
        ordinal: int,
        layers: int,
        *,
        expands_keys: bool = False,
        reader: Reader | None = None,
    ) -> None:
        self.policy = policy
        self.layer_idx = layer_idx
        self.ordinal = ordinal
        self.layers = layers
        self.expands_keys = expands_keys
        self.reader = reader
        self.budget = None if policy.budget is None else layer_budgets(policy.budget, ordinal, layers)
        self.reset(SlotTable(policy.columns))

    def reset(self, table: SlotTable) -> None:
        """Begin anew with an empty `table`."""
        self.table = table
        self.recent = RecentQueries(self.policy.recent_queries) if self.policy.recent_queries else None
        self.budgets: numpy.ndarray | None = None
        self.prompt_rows: tuple[int, ...] = ()
        self.decoded = 0
        self.evictions = 0
        self._limits: tuple[numpy.ndarray, int | Tensor, int | Tensor] | None = None

    def keep(
        self,
        forward: Forward,
        query: Tensor | None,
        keys: Tensor,
        arguments: AttentionArguments,
        *,
        taken_back: bool = False,
    ) -> None:
        """The end of a forward: the policy observes it, and what exceeds the budget goes.

        Args:
            query: `[batch, query_heads, rows, dim]`, `None` where nobody asked for queries.
            keys: of the table's slots, as attention saw them.
            taken_back: some rows of the forward may have been taken back; so many rows are no prompt then.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():  # a model called with gradients must not keep its graphs alive in the columns
                self._keep(forward, query, keys, arguments, taken_back)
        else:
            self._keep(forward, query, keys, arguments, taken_back)
        del forward.new_keys  # they may carry the forward (`hand_over`): each would keep the other alive

    def _keep(
        self, forward: Forward, query: Tensor | None, keys: Tensor, arguments: AttentionArguments, taken_back: bool
    ) -> None:
        table, tokens = self.table, forward.placed
        prompt = self.budgets is None or (forward.rows > 1 and not taken_back)
        self.decoded = 0 if prompt else self.decoded + forward.rows
        if prompt:
            past = self.prompt_rows or (0,) * len(tokens.counts)
            self.prompt_rows = tuple(before + new for before, new in zip(past, tokens.counts, strict=True))
        if self.budget is None and not self.policy.columns:
            self.budgets = table.held
            table.settle()
            return
        positions = tokens.positions
        if query is not None and forward.rows > 1 and tokens.padded:
            query, positions = padding_first(query, positions)
        observation = self._observation(forward, query, positions, keys, arguments)
        if self.recent is not None and query is not None:
            self.recent.push(query, observation.key_heads, positions)
        if self.policy.columns:
            self.policy.observe(observation)
        if prompt or self.budgets is None:
            self.budgets = self._allocate(observation)
            unlimited = self.budget is None or self.policy.recounts
            table.limit = None if unlimited else int(self.budgets.max()) + self.policy.interval
        if table.spare is not None and self.policy.interval == 1:
            sinks, window = self.protected()
            first_recent = observation.newest - window + 1
            slot = table.steady.weakest.find(self.policy.score(observation), sinks, first_recent)
            table.retire(slot[..., None])
            self.evictions += 1
        else:
            self._evict_many(observation, self.budgets)

    def adopt(self, forward: Forward) -> None:
        """Tokens came from another cache, without their queries: a policy that needs none evicts at once."""
        if self.policy.needs_queries:
            self.prompt_rows = forward.placed.seen
            self.table.settle()
        else:
            self.keep(forward, None, self.table.dense()[0], AttentionArguments(1.0))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held, those of the table aside."""
        if self.recent is not None:
            yield from self.recent.tensors()
        if self._limits is not None:
            yield from (limit for limit in self._limits[1:] if isinstance(limit, Tensor))

    def select_batch(self, index: Tensor, rows: list[int]) -> None:
        """Row `i` becomes what row `index[i] = rows[i]` was."""
        if self.recent is not None:
            self.recent.select_batch(index)
        self.prompt_rows = tuple(self.prompt_rows[row] for row in rows) if self.prompt_rows else ()
        self.budgets = None if self.budgets is None else self.budgets[rows]
        self._limits = None

    def state(self) -> dict[str, Any]:
        """Everything from which `load_state` makes an equal keeper, the table aside."""
        return {
            **{name: getattr(self, name) for name in _FACTS},
            "recent": None if self.recent is None else self.recent.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for name in _FACTS:
            setattr(self, name, state[name])
        if self.recent is not None:
            self.recent.load_state(state["recent"])

    # -- inside --------------------------------------------------------------------------------------------------------

    def _evict_many(self, observation: Observation, budgets: numpy.ndarray) -> None:
        """Cut the heads that hold more than `interval - 1` tokens above their budget back to it."""
        table, slack = self.table, self.policy.interval - 1
        over = table.held > budgets + slack
        if over.any() and self.policy.recounts:
            budgets = self.budgets = self._allocate(observation)
            over = table.held > budgets + slack
        if not over.any():
            if table.spare is None:
                table.settle()
            else:
                table.spare = table.empty_slot()
            return
        scores = self._ranked(observation)
        counts = numpy.where(over, numpy.minimum(budgets, table.held), table.held)
        goes = self.policy.discards(observation)
        if goes is not None:
            goes = goes & torch.from_numpy(over).to(scores.device)[..., None] & (scores < torch.inf)
            scores = scores.masked_fill(goes, -torch.inf)
            counts = numpy.minimum(counts, (scores > -torch.inf).sum(dim=-1).cpu().numpy())
        self.evictions += int((table.held - counts).max())
        if table.spare is not None:
            table.vacate(strongest(scores, table.positions, counts), counts)
            if self.reader is not None:
                self.reader.vacate()
            return
        if self.reader is not None:
            self.reader.rearrange()
        if goes is None and budgets.min() != budgets.max():
            table.keep_ragged(survivors(scores, counts), counts, budgets + 1 + slack)
        else:
            room = int(budgets.max()) + 1 + slack - int(counts.max())
            if self.policy.recounts:
                room = max(room, 2)  # not steady: the next count may ask for more slots
            table.keep(survivors(scores, counts), counts, room)

    def _ranked(self, observation: Observation) -> Tensor:
        sinks, window = self.protected()
        return ranked(self.policy.score(observation), observation.positions, sinks, observation.newest - window + 1)

    def protected(self) -> tuple[int | Tensor, int | Tensor]:
        """How many tokens at the beginning and at the end of each head are never evicted: integers, or `[batch, kv_heads, 1]`.

        Raises:
            RuntimeError: there are no budgets before the first prompt.
        """
        if self.budgets is None:
            raise RuntimeError("budgets are known after the first prompt")
        if self._limits is None or self._limits[0] is not self.budgets:
            self._limits = (self.budgets, *self._protect(self.budgets))
        return self._limits[1:]

    def _protect(self, budgets: numpy.ndarray) -> tuple[int | Tensor, int | Tensor]:
        if budgets.min() == budgets.max():
            budget = int(budgets.flat[0])
            sinks = min(self.policy.protected_sinks, budget - 1)
            return sinks, min(self.policy.protected_window(budget), budget - sinks)
        windows = numpy.vectorize(self.policy.protected_window, otypes=[numpy.int64])(budgets)
        limits = numpy.stack([budgets, windows])[..., None]
        per_head, own = torch.from_numpy(limits).to(self.table.keys.device)
        first = (per_head - 1).clamp(max=self.policy.protected_sinks)
        return first, torch.minimum(per_head - first, own)  # tensors of their own, not views of `limits`

    def _allocate(self, observation: Observation) -> numpy.ndarray:
        """`[batch, kv_heads]` tokens to keep."""
        batch, kv_heads = observation.positions.shape[:2]
        if self.budget is None:
            return numpy.full((batch, kv_heads), numpy.iinfo(numpy.int64).max)
        kv_heads *= self.heads.size  # of all processes, which decide alike; the cache's bytes are those of all of them
        cost = self.layers * self.table.bytes_per_token * self.heads.size
        recent = 0 if self.recent is None else held_bytes(self.recent.tensors())
        limits = 2 * batch * kv_heads * torch.long.itemsize  # where heads differ, see `_protect`
        fixed = self.layers * ((self.table.fixed_bytes + recent) * self.heads.size + limits)
        given = [budget.resolve(self.prompt_rows, cost, fixed, spare=self.policy.interval) for budget in self.budget]
        if len(given) > 1 and len(given) != kv_heads:
            raise ValueError(
                f"budget of {self.policy.name} must have an entry for each of {kv_heads} KV heads in layer {self.layer_idx}, "
                f"got {len(given)}"
            )
        if len(given) > 1:
            return self.heads.own(self._per_head(list(zip(*given, strict=True)), kv_heads))
        budgets = self._per_head(self.policy.allocate(observation, given[0]), kv_heads)
        allowed, slot_bytes = int(budgets.sum()), self.table.bytes_per_token * self.heads.size // (batch * kv_heads)
        while self.budget[0].size is not None and (over := self._padded_bytes(budgets) - allowed * slot_bytes) > 0:
            lower = [tokens - -(-over // (slot_bytes * budgets.size)) for tokens in given[0]]
            if min(lower) < 1:
                break
            given[0] = lower
            budgets = self._per_head(self.policy.allocate(observation, lower), kv_heads)
        return self.heads.own(budgets)

    def _per_head(self, rows: Sequence[Any], kv_heads: int) -> numpy.ndarray:
        per_head = [numpy.broadcast_to(row, kv_heads) for row in rows]
        return numpy.maximum(numpy.array(per_head, dtype=numpy.int64), 1)

    def _padded_bytes(self, budgets: numpy.ndarray) -> int:
        """Bytes of a layer's slots when heads keep `budgets`: small columns are as long as the longest head."""
        batch, kv_heads = budgets.shape
        here = batch * kv_heads // self.heads.size
        item = self.table.kv_bytes_per_token // here
        columns = self.table.bytes_per_token // here - item
        if budgets.min() != budgets.max():
            columns += 1  # `RaggedRows.outside`
        padded: int = budgets.sum() * item + budgets.max() * budgets.size * columns
        return padded

    def _observation(
        self,
        forward: Forward,
        query: Tensor | None,
        query_positions: Tensor,
        keys: Tensor,
        arguments: AttentionArguments,
    ) -> Observation:
        table, tokens = self.table, forward.placed
        layout: dict[str, Any] = {}
        visible = forward.visible
        if self.expands_keys and table.rows is not None:
            visible = table.positions
        elif not self.expands_keys and (forward.prepared is not None or table.has_layout):
            keys, _, layout = table.readable()
            layout = {name: given for name, given in layout.items() if name != "values_scale"}
        rotation = None if self.reader is None else self.reader.rotation
        if rotation is not None and self.policy.needs_queries:  # scores are made at the tokens' own positions
            stored, layout, visible = table.dense()[0], {}, table.positions
            keys = rotation.rotate(stored, table.positions)
        return Observation(
            layer=self.layer_idx,
            layers=self.layers,
            ordinal=self.ordinal,
            rows=forward.rows,
            positions=table.positions,
            columns=table.policy_columns,
            newest=tokens.newest,
            seen=tokens.seen,
            new_keys=forward.new_keys,
            new_slots=forward.new,
            query=query,
            keys=keys,
            values=table.dense()[1] if self.policy.needs_values else None,
            query_positions=query_positions,
            visible=visible,
            arguments=arguments,
            weights=forward.weights,
            weights_reduction=self.policy.weights_reduction,
            token_ids=forward.token_ids,
            decoded=self.decoded,
            recent=self.recent,
            heads=self.heads,
            **layout,
        )


def padding_first(query: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Query rows `[batch, query_heads, rows, dim]` and their `positions [batch, rows]`, padding moved before the real ones: the last rows
    are then the last tokens, where a batch was padded on the right too."""
    if bool((positions[:, -1] >= 0).all()):
        return query, positions
    order = (positions >= 0).int().argsort(dim=-1, stable=True)
    rows = order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, rows), positions.gather(1, order)
