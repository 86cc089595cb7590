"""What a policy sees of one forward through one layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.attention_mass.noise import seed_from_head
from kvpress.kernels.scores import causal_positions, flat_to_dense, scale_slots, slot_scores
from kvpress.recent_queries import RecentQueries
from kvpress.tensor_parallel import ALONE, HeadShards


@dataclass(slots=True)
class AttentionArguments:
    """How the model attends in this layer: scores are `scaling * q . k`, capped, with per-head sinks in the softmax."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass
class Observation:
    """The slots of a layer after a forward attended to them, and the queries that did.

    After a forward of several tokens the slots are in ascending order of position, empty ones first; after a decoded token they are in
    no order. Scores are made of `positions`, `columns`, `new_keys` and `attention_mass`.

    Attributes:
        layer: index of the layer in the model.
        layers: number of layers of the model that are compressed.
        ordinal: index of this layer among those.
        rows: tokens of this forward, padding included.
        positions: `[batch, kv_heads, slots]` int32, `-1` for an empty slot.
        columns: the policy's own columns, `[batch, kv_heads, slots]` fp32 each; change them in place.
        newest: position of the last token of each batch row: an int when equal, else `[batch, 1, 1]`.
        seen: tokens of each batch row so far, padding excluded.
        new_keys: `[batch, kv_heads, rows, dim]` keys of this forward's tokens, as stored.
        new_slots: where they lie: a slice of the slots, or `[batch, kv_heads, 1]` indices.
        query: `[batch, query_heads, rows, dim]`, `None` for a policy that needs none.
        weights: of a decoded token, its softmax weights `[batch, heads of the keys, slots]` reduced by `weights_reduction`.
        keys: `[batch, heads, slots, dim]` as attention saw them, or `[rows, dim]` with `starts` and `lengths` where heads are ragged; in
            the cache's `kv_dtype`: int8 ones are to be multiplied with `keys_scale` (`read_keys` does that).
        values: `[batch, kv_heads, slots, dim]`, `None` for a policy that needs none.
        query_positions: `[batch or 1, rows]`.
        decoded: tokens since the last prompt, those of this forward included; 0 for a prompt.
        recent: the last query rows, where the policy asks for them.
        token_ids: `[batch, rows]`, `None` for a policy that needs none.
        heads: the share of the model's heads that these are: what is decided over all heads is summed or gathered there.
        visible: `[batch or 1, kv_heads or 1, slots]` positions for causality in `attention_mass`, `None` when every slot is visible.
    """

    layer: int
    layers: int
    ordinal: int
    rows: int
    positions: Tensor
    columns: dict[str, Tensor]
    newest: int | Tensor
    seen: tuple[int, ...]
    new_keys: Tensor
    new_slots: slice | Tensor
    query: Tensor | None = None
    keys: Tensor | None = None
    keys_scale: Tensor | None = None
    values: Tensor | None = None
    query_positions: Tensor | None = None
    visible: Tensor | None = None
    arguments: AttentionArguments = field(default_factory=lambda: AttentionArguments(1.0))
    weights: Tensor | None = None
    weights_reduction: str | None = None
    starts: Tensor | None = None
    lengths: Tensor | None = None
    token_ids: Tensor | None = None
    decoded: int = 0
    recent: RecentQueries | None = None
    heads: HeadShards = ALONE

    def read_token_ids(self) -> Tensor:
        """Ids `[batch, rows]` of this forward's tokens.

        Raises:
            ValueError: none at hand (the policy did not declare `needs_token_ids`).
        """
        if self.token_ids is None:
            raise ValueError("token ids are not at hand: the policy must set needs_token_ids = True")
        return self.token_ids

    def set_new(self, column: str, values: Tensor) -> None:
        """Write `values [batch, kv_heads or 1, rows]` into `column` at this forward's slots."""
        if isinstance(self.new_slots, slice):
            self.columns[column][:, :, self.new_slots] = values
        else:
            self.columns[column].scatter_(-1, self.new_slots, values.expand(self.new_slots.shape))

    def read_keys(self) -> Tensor:
        """`keys` in the type of the query rows or wider, multiplied with their scales.

        Raises:
            ValueError: no keys at hand.
        """
        if self.keys is None:
            raise ValueError("keys are not at hand: the policy must set needs_queries = True")
        return scale_slots(self.keys, self.keys_scale).to(self.new_keys.dtype)

    @property
    def key_heads(self) -> int:
        """Heads of `keys`: the table's KV heads, or more where the model expands latents."""
        if self.starts is not None or self.keys is None:
            return self.positions.shape[1]
        return self.keys.shape[1]

    def in_window(self, window: int) -> Tensor:
        """`[batch, kv_heads, slots]` of bool: the slot holds one of the last `window` tokens."""
        return self.positions > self.newest - window

    def attention_mass(
        self,
        rows: int,
        *,
        row_weights: Tensor | None = None,
        temperature: float = 1.0,
        noise_seed: int | None = None,
    ) -> Tensor:
        """`[batch, query_heads, slots]` fp32: softmax weight that each slot received from the last `rows` queries of this forward, summed.

        Args:
            rows: how many; padding among them adds nothing.
            row_weights: `[batch or 1, rows]` factor of each row in the sum.
            temperature: scores are divided by it.
            noise_seed: add Gumbel noise (`kvpress.kernels.attention_mass.noise`) to the scores first.

        Raises:
            ValueError: no queries at hand (the policy did not declare `needs_queries`).
        """
        if self.query is None or self.keys is None:
            raise ValueError("attention_mass needs query rows: the policy must set needs_queries = True")
        positions, query_positions = self.visible, self.query_positions
        if noise_seed is not None:
            positions = self.positions  # noise goes by positions, and by the head's number in the model
            noise_seed = seed_from_head(noise_seed, self.heads.first(self.query.shape[1]))
        elif rows == 1:
            query_positions = None  # the newest token sees every slot
        elif positions is None:
            positions, query_positions = causal_positions(self.query, self.keys)
        return attention_mass(
            self.query[:, :, -rows:],
            self.keys,
            scaling=self.arguments.scaling,
            positions=positions,
            query_positions=None if query_positions is None else query_positions[:, -rows:],
            softcap=self.arguments.softcap,
            sinks=self.arguments.sinks,
            starts=self.starts,
            lengths=self.lengths,
            keys_scale=self.keys_scale,
            row_weights=row_weights,
            temperature=temperature,
            noise_seed=noise_seed,
        )

    def recent_scores(self, among: Tensor) -> Tensor:
        """Scores of the last queries, summed over the query heads of each KV head: `[batch, kv_heads, window, slots]` fp32.

        They are before any soft cap. `-inf` where `among [batch, kv_heads, slots]` is `False`, for empty slots, and for
        rows that are padding or have not come yet.

        Raises:
            ValueError: no such queries (the policy did not declare `recent_queries`).
        """
        if self.recent is None or self.recent.queries is None or self.recent.positions is None or self.keys is None:
            raise ValueError("recent_scores needs the last queries: the policy must set recent_queries")
        queries, keys, positions = self.recent.queries, self.read_keys(), self.positions.masked_fill(~among, -1)
        if self.starts is not None and self.lengths is not None:
            keys, _, positions = flat_to_dense(keys, keys, positions, self.starts, self.lengths)
        kv_heads, shared = positions.shape[1], queries.shape[1] // positions.shape[1]
        positions = positions.repeat_interleave(shared, dim=1)
        scores = slot_scores(queries, keys, positions, self.recent.positions, self.arguments.scaling, None)
        batch, _, _, rows, slots = scores.shape
        return scores.view(batch, kv_heads, shared, rows, slots).sum(dim=2)

    def grouped_mass(self, rows: int, reduce: str, **arguments: Any) -> Tensor:
        """`attention_mass` reduced over the query heads of each KV head by `"mean"`, `"max"` or `"sum"`: `[batch, kv_heads, slots]`."""
        if rows == 1 and self.weights is not None and reduce == self.weights_reduction and not arguments:
            mass = self.weights  # attention left them; where the model expands keys, per expanded head
        else:
            mass = self.attention_mass(rows, **arguments)
        batch, kv_heads = self.positions.shape[:2]
        if mass.shape[1] == kv_heads:
            return mass
        groups = mass.view(batch, kv_heads, -1, mass.shape[-1])
        if reduce == "max":
            return groups.amax(dim=2)
        return groups.sum(dim=2) if reduce == "sum" else groups.mean(dim=2)
