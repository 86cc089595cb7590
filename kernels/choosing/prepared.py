"""TokenSelect's step for decoded tokens over slots in order, in one call: what is the same at every token is looked up once."""

from __future__ import annotations

import struct
from array import array
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels import triton_support
from kvpress.kernels.choosing import native
from kvpress.kernels.native import tensors as fields
from kvpress.kernels.query_kind import QueryKind

THREADS, QUERY, SLOTS = fields.PLACE["threads"], fields.PLACE["query"], fields.PLACE["slots"]
_BEHIND = struct.Struct("=dqqqqqqqq")  # the fields of `VotedSlots` behind those of `Attention`, in `arguments.hpp`


class PreparedVote:
    """`reused_slots`, or where a batch row cannot use its selection again `head_vote`, `best_slots` and `listed_slots`.

    Args:
        query: `[batch, query_heads, 1, dim]`, like those that will be asked for.
        keys: `[batch, kv_heads, room, dim]`; those of the slots in use come first.
        keys_scale: `[batch, kv_heads, room]` of int8 keys, and of int4 ones (uint8 `[batch, kv_heads, room, dim / 2]`).
        threshold: the least cosine under which a selection is used again.
        sinks, top_k, local: the first slots and the last, always attended to, and how many between them are chosen.
        regroup: query head `h` votes with KV head `h % kv_heads`, not `h // (query_heads // kv_heads)`.
        turn: cosines and sines `[rotary_dim]` by which the query is turned before it votes.

    Attributes:
        former: `[batch, query_heads * dim]`, of each row the query that chose.
        live: `[batch]` bool: whether one has.
        chosen: `[batch, 1, top_k]` int64, what it chose. All three are written where a selection is made anew.
        turn: as given.
        shape: of the lists.
        by_kernel: by the compiled kernel, which `call_for` serves.

    Raises:
        ValueError: tensors that `refusal` would name.
    """

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        keys_scale: Tensor | None,
        *,
        threshold: float,
        sinks: int,
        top_k: int,
        local: int,
        regroup: bool = False,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        reason = self.refusal(query, keys)
        if reason is not None:
            raise ValueError(f"a vote cannot be prepared: {reason}")
        batch, heads, _, dim = query.shape
        self.keys = keys
        self._kind = QueryKind(query)
        self._least = sinks + top_k + local
        self.shape = (batch, 1, self._least)
        self.former = torch.zeros(batch, heads * dim, dtype=query.dtype, device=query.device)
        self.live = torch.zeros(batch, dtype=torch.bool, device=query.device)
        self.chosen = torch.zeros(batch, 1, top_k, dtype=torch.int64, device=query.device)
        self.turn = turn  # the kernel reads them at every vote
        self._launches: Any = None  # on a GPU, in place of the fields
        self.by_kernel = not (query.is_cuda or triton_support.interpreted())
        if not self.by_kernel:
            self._launches = import_module("kvpress.kernels.choosing.triton_prepared").VoteLaunches(
                query, keys, keys_scale, self.former, self.live, self.chosen,
                threshold=threshold, sinks=sinks, local=local, regroup=regroup, turn=turn,
            )  # fmt: skip
            return
        tables = None if turn is None else (turn[0][None], turn[1][None])
        found, self._owners = fields.attention_fields(
            query,
            keys,
            keys,
            kv_heads=keys.shape[1],
            keys_scale=keys_scale,
            rotation=tables,
        )
        written = (self.former.data_ptr(), self.live.data_ptr(), self.chosen.data_ptr())
        behind = _BEHIND.pack(threshold, sinks, top_k, local, int(regroup), *written, 0)
        self._fields = fields.packed(found) + array("q", behind)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Of a copied selection there is none yet: addresses are those of the original."""

    @staticmethod
    def refusal(query: Tensor, keys: Tensor) -> str | None:
        """Why neither the compiled kernel nor those of GPUs can serve such calls, or `None`."""
        if query.is_cuda or triton_support.interpreted():
            return triton_support.refusal(query, keys) or triton_support.storage_refusal(keys)
        return native.vote_refusal(query, keys)

    def serves(self, query: Tensor, keys: Tensor) -> bool:
        """Whether a call with `query` is of the kind that was prepared, and the keys are those."""
        return keys is self.keys and self._kind.serves(query)

    def remember(self, former: Tensor, live: Tensor, chosen: Tensor) -> None:
        """Go on with a selection that was made elsewhere."""
        for own, given in ((self.former, former), (self.live, live), (self.chosen, chosen)):
            own.copy_(given)

    def tensors(self) -> list[Tensor]:
        """What is held beside `former`, `live` and `chosen`."""
        return [*(self.turn or ()), *(() if self._launches is None else self._launches.tensors())]

    def choose(self, query: Tensor, slots: int) -> tuple[Tensor, bool]:
        """`[batch, 1, sinks + top_k + local]` int64, ascending; and whether every row used its selection again.

        Args:
            query: of the kind that was prepared.
            slots: in use, all of them tokens.

        Raises:
            ValueError: fewer slots than are listed.
        """
        if slots < self._least:
            raise ValueError(f"slots must be at least {self._least}, those that are listed, got {slots}")
        if self._launches is not None:
            chosen: tuple[Tensor, bool] = self._launches(query, slots)
            return chosen
        index = torch.empty(self.shape, dtype=torch.int64)
        anew: bool = fields.built().voted_slots(self.call_for(query.data_ptr(), slots, index.data_ptr()))
        return index, not anew

    def call_for(self, query: int, slots: int, index: int) -> array[int]:
        """The fields of the compiled kernel's call that writes the list to the address `index`, of a query at the address `query`."""
        call = self._fields
        call[THREADS], call[QUERY], call[SLOTS], call[-1] = torch.get_num_threads(), query, slots, index
        return call
