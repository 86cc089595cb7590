"""TokenSelect: per-head soft votes choose the tokens that a chunk or a decoded token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvpress.kernels.choosing import listed_slots, reused_slots
from kvpress.kernels.choosing.prepared import PreparedVote
from kvpress.kernels.head_vote import head_vote
from kvpress.policies.base import check_choice, check_integer
from kvpress.policies.key_index import KeyIndex
from kvpress.policies.selection import ALL, Every, SelectionPolicy, Selector, SlotView, best_slots
from kvpress.row_format import part, parts
from kvpress.tensor_parallel import HeadShards

INDEXES = ["exact", "int8", "int4"]


@dataclass(frozen=True)
class TokenSelect(SelectionPolicy):
    """Attends to the first `sinks` tokens, the last `local` ones, and the `top_k` others that the query heads vote for.

    Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache
    Selection", arXiv 2411.02886. A head's vote is the softmax of its dot products over the candidates, without `1 / sqrt(dim)`; votes are
    summed over heads, one set serves all heads of a layer. A chunk of a prompt votes with its mean query. While decoding, a selection is
    used again as long as the cosine of the concatenated query with the one that made it stays at `threshold`.

    Args:
        top_k: tokens selected beside sinks and local window.
        sinks: first tokens, always attended to.
        local: last tokens, always attended to; at least `chunk`.
        threshold: of the cosine; above 1 every step selects anew.
        chunk: rows of a prompt that select together.
        positions: `"reindex"` lets attention run over positions 0 … n-1, and the vote at one distance (query rotated to `local`, keys not
            rotated), which also serves contexts beyond the trained length; `"keep"` uses keys and queries as they are rotated.
        group: `"floor"` pairs query head `h` with KV head `h // group`, as attention does; `"mod"` with `h % kv_heads`, as the paper's
            released kernel does.
        tail: last rows of a prompt, which select each for itself (beyond the paper); 0 for none.
        index: what votes are taken on: `"exact"` keys, or their copies in `"int8"` or `"int4"` with a scale for each token and KV head
            (beyond the paper). The copies take a quarter of the keys' bytes in fp32, or an eighth; a vote reads nothing else. int4 chooses
            other tokens than exact keys do more often, and needs head sizes that are multiples of 8.
    """

    name: ClassVar[str] = "tokenselect"
    summary: ClassVar[str] = "tokens that the query heads vote for"
    paper: ClassVar[str] = "arXiv 2411.02886"
    fails: ClassVar[str] = "one needle in a chunk of haystack is blurred by the chunk's mean query (see `tail`)"
    needs: ClassVar[str] = "queries"
    selects_for_prompts: ClassVar[bool] = True
    selects_for_all_heads: ClassVar[bool] = True

    top_k: int = 2048
    sinks: int = 128
    local: int = 512
    threshold: float = 0.9
    chunk: int = 512
    positions: str = "reindex"
    group: str = "floor"
    tail: int = 32
    index: str = "exact"

    def __post_init__(self) -> None:
        for field, minimum in (("top_k", 1), ("sinks", 0), ("local", 1), ("chunk", 1), ("tail", 0)):
            check_integer(self.name, field, getattr(self, field), minimum)
        check_choice(self.name, "positions", self.positions, ["reindex", "keep"])
        check_choice(self.name, "group", self.group, ["floor", "mod"])
        check_choice(self.name, "index", self.index, INDEXES)
        if self.local < self.chunk:
            raise ValueError(
                f"local of {self.name} must be at least chunk={self.chunk}, got {self.local}: a chunk must see itself"
            )
        if not isinstance(self.threshold, int | float) or not -1 <= self.threshold <= 2:
            raise ValueError(
                f"threshold of {self.name} must be a cosine (above 1: never reuse), got {self.threshold!r}"
            )

    @property
    def reindexes(self) -> bool:
        return self.positions == "reindex"

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        tail = min(self.tail, rows - 1)
        cuts = [*range(0, rows - tail, self.chunk), *range(rows - tail, rows), rows]
        return list(pairwise(cuts))

    def selector(self, layer: int, ordinal: int, layers: int, shared: dict[str, Any]) -> VoteSelector:
        return VoteSelector(self)


ROUNDING = 1e-12  # of the cosine of a query with itself
# keys of the local window that may wait to be taken into the index: several at once cost little more than one
TOGETHER = 16
CACHED = ("query", "chosen", "chosen_positions", "live")


class VoteSelector(Selector):
    """Votes, and the Selection Cache of one layer: the query that selected last, what it selected, and where that stood."""

    one_set = tells_at_once = True
    complete_lists = True

    def __init__(self, policy: TokenSelect) -> None:
        self.policy = policy
        self.index = None if policy.index == "exact" else KeyIndex(policy.index)
        self.has_index = self.index is not None
        self.hits = self.misses = 0
        self.query: Tensor | None = None  # [batch, query_heads * dim]
        self.chosen: Tensor | None = None  # slots, [batch, kv_heads or 1, top_k]
        self.chosen_positions: Tensor | None = None  # of slots in order there are none: they are the slots
        self._step: PreparedVote | None = None
        # [batch] rows that had more candidates than top_k: the others chose nothing yet
        self.live: Tensor | None = None

    def rearrange(self) -> None:
        self._choose_anew()
        if self.index is not None:
            self.index.clear()

    def crop(self, slots: int) -> None:
        self._choose_anew()
        if self.index is not None:
            self.index.crop(slots)

    def select_batch(self, index: Tensor) -> None:
        for name in CACHED:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[index.to(tensor.device)])
        self._step = None
        if self.index is not None:
            self.index.select_batch(index)

    def tensors(self) -> list[Tensor]:
        return [*([] if self.index is None else self.index.tensors()), *self._cached()]

    def _cached(self) -> list[Tensor]:
        """The tensors of the Selection Cache, and those of its prepared call."""
        of_call = [] if self._step is None else self._step.tensors()
        return [*(tensor for name in CACHED if (tensor := getattr(self, name)) is not None), *of_call]

    def bytes_to_grow(self, keys: Any) -> int:
        return 0 if self.index is None or not self.narrows(keys.shape[2]) else self.index.bytes_to_grow(keys)

    def state(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in CACHED}
        cached = {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}
        return {**super().state(), **cached, "index": None if self.index is None else self.index.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        for name in CACHED:
            setattr(self, name, state[name])
        self._step = None
        if self.index is not None:
            self.index.load_state(state["index"])

    def narrows(self, slots: int) -> bool:
        return slots > self.policy.sinks + self.policy.top_k + self.policy.local

    def at_once(self, query: Tensor, slots: int) -> PreparedVote | Every | None:
        if not self.narrows(slots):
            return ALL
        step, index = self._step, self.index
        if step is None or not step.by_kernel or self.query is not step.former:
            return None
        if index is not None and (step.keys is not index.codes or not self._may_wait(index, slots)):
            return None
        return step if step.serves(query, step.keys) else None

    def called(self, anew: bool) -> None:
        self.hits += not anew
        self.misses += anew

    def select(self, view: SlotView) -> Tensor | None:
        policy = self.policy
        if not view.decoding:
            self._choose_anew()  # a prompt brings tokens that an earlier selection could not choose
        if not self.narrows(view.slots):
            return None
        may_wait = self.index is not None and view.decoding and view.ordered and self._may_wait(self.index, view.slots)
        if self.index is not None and not may_wait:
            self.index.follow(view)
        if not view.decoding:
            return assemble(view, self._vote(view, view.query.mean(dim=2))[0], policy.sinks, policy.local)
        if view.ordered and (index := self._by_kernel(view)) is not None:
            return index
        in_order = view.ordered and view.heads.size == 1
        if in_order and (again := self._reuse(view)) is not None:
            self.hits += 1
            return again
        query = view.query[:, :, 0]
        flat = query.flatten(1)
        positions = view.positions if not view.shared else view.positions[:, :1]
        same = None  # rows that use their selection again
        if self.query is not None and self.live is not None and not (in_order and flat.shape[0] == 1):
            cosine = cosine_of_all_heads(view.heads, flat.double(), self.query.double())
            same = (cosine >= policy.threshold - ROUNDING) & self.live
            if bool(same.all()):
                self.hits += 1
                return assemble(view, self._still_there(positions), policy.sinks, policy.local)
        self.misses += 1
        chosen, live = self._vote(view, query)
        if self.query is not None and same is not None and bool(same.any()):
            chosen = torch.where(same[:, None, None], self._still_there(positions), chosen)
            flat, live = torch.where(same[:, None], self.query, flat), live | same
        self.query, self.chosen, self.live = flat.clone(), chosen, live  # the rows may be a view of the model's own
        self.chosen_positions = None if view.ordered else positions.gather(-1, chosen.clamp(min=0))
        return assemble(view, chosen, policy.sinks, policy.local)

    def _may_wait(self, index: KeyIndex, slots: int) -> bool:
        """Whether of `slots` slots in order only keys of the local window are not in the index yet, for which nobody votes."""
        behind = slots - index.covered
        return index.settled and not index.steady and 0 <= behind <= min(self.policy.local, TOGETHER)

    def _by_kernel(self, view: SlotView) -> Tensor | None:
        """A decoded token's step over slots in order by one call of the compiled kernel, where it can serve."""
        keys, scales = view.buffer if self.index is None else (self.index.codes, self.index.scales)
        if keys is None or not view.shared or view.heads.size > 1:
            return None
        step = self._step
        if step is None or not step.serves(view.query, keys):
            step = self._step = self._prepared(view, keys, scales)
            if step is None:
                return None
        if self.query is None or self.live is None or self.chosen is None:
            step.live.zero_()
        elif self.query is not step.former:
            step.remember(self.query, self.live, self.chosen)
        index, again = step.choose(view.query, view.slots)
        if again:
            self.hits += 1
        else:
            self.misses += 1
        self.query, self.live, self.chosen, self.chosen_positions = step.former, step.live, step.chosen, None
        return index

    def _prepared(self, view: SlotView, keys: Tensor, scales: Tensor | None) -> PreparedVote | None:
        policy, turn = self.policy, None
        if PreparedVote.refusal(view.query, keys) is not None:
            return None
        if view.rotation is not None:
            tables = view.rotation.tables(view.query, policy.local + 1)
            if tables is None:
                return None
            cosine, sine = (table[policy.local].clone() for table in tables)  # not to hold on to whole tables
            turn = (cosine, sine)
        return PreparedVote(
            view.query,
            keys,
            scales,
            threshold=policy.threshold - ROUNDING,
            sinks=policy.sinks,
            top_k=policy.top_k,
            local=policy.local,
            regroup=policy.group == "mod",
            turn=turn,
        )

    def _reuse(self, view: SlotView) -> Tensor | None:
        """The former selection among slots that are in order, where each of a chosen token stays its own."""
        if self.query is None or self.live is None or self.chosen is None:
            return None
        return reused_slots(
            view.query,
            self.query,
            self.live,
            self.chosen,
            threshold=self.policy.threshold - ROUNDING,
            sinks=self.policy.sinks,
            local=self.policy.local,
            slots=view.slots,
        )

    def _choose_anew(self) -> None:
        self.query = self.chosen = self.chosen_positions = self.live = self._step = None

    def _still_there(self, positions: Tensor) -> Tensor:
        """The chosen slots, `-1` where another token has taken the place."""
        if self.chosen is None:
            raise RuntimeError("nothing was selected yet")
        before = self.chosen if self.chosen_positions is None else self.chosen_positions
        return self.chosen.where(positions.gather(-1, self.chosen.clamp(min=0)) == before, -1)

    def _vote(self, view: SlotView, query: Tensor) -> tuple[Tensor, Tensor]:
        """The `top_k` candidates with most votes, slots `[batch, kv_heads or 1, top_k]`, `-1` where there are fewer; and `[batch]`
        whether there were more to choose from."""
        policy, kv_heads = self.policy, view.keys.shape[1]
        batch, heads, dim = query.shape
        if view.rotation is not None:
            query = view.rotation.rotate_last(query[:, :, None], policy.local + 1).squeeze(2)
        if policy.group == "mod":  # the order of heads in a sum is free: those of a KV head come together
            query = query.view(batch, -1, kv_heads, dim).transpose(1, 2).reshape(batch, heads, dim)
        if view.ordered:  # slot and position are the same number: candidates are a range
            first, last = policy.sinks, int(view.newest) + 1 - policy.local
            votes = self._count(view, query, first, last, None)
            return best_slots(votes, policy.top_k) + first, torch.ones(batch, dtype=torch.bool, device=votes.device)
        candidates = candidate_slots(view, policy.sinks, policy.local)
        votes = self._count(view, query, 0, view.slots, candidates)
        candidates = candidates[:, : votes.shape[1]]
        votes = votes.masked_fill(~candidates, -1.0)
        live = (candidates.sum(dim=-1) > policy.top_k).any(dim=-1)
        best = best_slots(votes, policy.top_k, None if view.ascending else view.positions[:, : votes.shape[1]])
        return best.masked_fill(~candidates.gather(-1, best), -1), live

    def _count(self, view: SlotView, query: Tensor, first: int, last: int, candidates: Tensor | None) -> Tensor:
        """Votes `[batch, kv_heads or 1, last - first]` for slots from `first` on, NaN counting as none."""
        if self.index is None:
            keys, scales = parts(part(view.keys, slice(None), slice(None), slice(first, last)))
        else:
            keys, scales = self.index.read(first, last)
        batch, kv_heads = keys.shape[:2]
        positions = None if candidates is None else candidates.int() - 1
        if not view.shared:  # each KV head holds its own tokens: a batch row of its own
            query = query.reshape(batch * kv_heads, -1, query.shape[-1])
            keys = keys.reshape(batch * kv_heads, 1, *keys.shape[2:])
            positions = None if positions is None else positions.reshape(batch * kv_heads, 1, -1)
            scales = None if scales is None else scales.reshape(batch * kv_heads, 1, -1)
        votes = head_vote(query[:, :, None], keys, positions=positions, keys_scale=scales)
        votes = votes.nan_to_num_(0.0).view(batch, -1, keys.shape[2])
        return view.heads.sum(votes) if view.shared else votes


def cosine_of_all_heads(heads: HeadShards, query: Tensor, former: Tensor) -> Tensor:
    """Cosine `[batch]` of two queries `[batch, query_heads * dim]`, of which other processes may hold further heads."""
    if heads.size == 1:
        return cosine_similarity(query, former, dim=-1)
    products = heads.sum(torch.stack([(query * former).sum(-1), query.square().sum(-1), former.square().sum(-1)]))
    return products[0] / (products[1] * products[2]).sqrt().clamp(min=1e-8)


def candidate_slots(view: SlotView, sinks: int, local: int) -> Tensor:
    """`[batch, kv_heads, slots]` of bool: tokens that are neither sinks nor among the last `local` up to `view.newest`."""
    return (view.positions >= sinks) & (view.positions <= view.newest - local)


def assemble(view: SlotView, chosen: Tensor, sinks: int, local: int) -> Tensor:
    """Sinks, chosen slots and local window: `[batch, kv_heads or 1, n]`, ascending by position where slots are ordered."""
    if view.ordered:
        return listed_slots(chosen, sinks=sinks, local=local, slots=int(view.newest) + 1)
    positions = view.positions if chosen.shape[1] > 1 or not view.shared else view.positions[:, :1]
    always = (positions >= 0) & (positions <= view.newest) & ((positions < sinks) | (positions > view.newest - local))
    ends = always.int().topk(min(sinks + local, positions.shape[-1]), dim=-1)
    return torch.cat([ends.indices.masked_fill(ends.values == 0, -1), chosen], dim=-1)
