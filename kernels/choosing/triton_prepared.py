"""TokenSelect's step for decoded tokens on GPUs: launches whose constant arguments are looked up once, and one wait, for the decision
to use a selection again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress.kernels import triton_best
from kvpress.kernels.attention_mass import triton_kernels as mass_kernels
from kvpress.kernels.attention_mass.triton import block_rows, shared_arguments
from kvpress.kernels.choosing import triton_kernels
from kvpress.kernels.choosing.triton import BLOCK, best_of_pieces
from kvpress.kernels.head_vote import triton_kernels as vote_kernels
from kvpress.kernels.head_vote.triton import BLOCK_HEADS, BLOCK_SLOTS
from kvpress.kernels.triton_blocks import FULL
from kvpress.kernels.triton_launch import PreparedLaunch
from kvpress.kernels.triton_support import on_device, plan_splits


class VoteLaunches:
    """`kvpress.kernels.choosing.prepared.PreparedVote` on a GPU, with the same arguments.

    Args:
        former, live, chosen: what is remembered, read and written.
    """

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        keys_scale: Tensor | None,
        former: Tensor,
        live: Tensor,
        chosen: Tensor,
        *,
        threshold: float,
        sinks: int,
        local: int,
        regroup: bool,
        turn: tuple[Tensor, Tensor] | None,
    ) -> None:
        batch, heads, _, dim = query.shape
        kv_heads, length = keys.shape[1], heads * dim
        self._threshold, self._ends = threshold, sinks + local
        self._shape = (batch, 1, sinks + chosen.shape[2] + local)
        self._heads, self._pairs = (batch, heads), batch * kv_heads
        group = heads // kv_heads
        cosines = torch.zeros(batch, dtype=torch.float64, device=query.device)
        voting = torch.zeros(batch, heads, 1, dim, dtype=query.dtype, device=query.device)
        least = torch.full((1,), threshold, dtype=torch.float64, device=query.device)  # a number would become fp32
        self._cosines, self._own = cosines, [cosines, voting, least]
        cosine, sine = (None, None) if turn is None else turn
        row = dict(zip(("stride_qb", "stride_qh", "stride_qd"), query[:, :, 0].stride(), strict=True))
        self._look = PreparedLaunch(
            triton_kernels.cosine_kernel,
            {
                "former": former, "live": live, "output": cosines, "voting": voting, "cosine": cosine, "sine": sine,
                "length": length, **row, "stride_fb": length, "DIM": dim,
                "ROTARY": 0 if cosine is None else cosine.shape[-1],
                "GROUP": group, "KV_HEADS": kv_heads if regroup else 0, "BLOCK": BLOCK,
            },
        )  # fmt: skip
        self._list = PreparedLaunch(
            triton_kernels.list_kernel,
            {
                "chosen": chosen, "chosen_count": chosen.shape[2], "sinks": sinks, "local": local,
                "stride_cb": chosen.stride(0), "stride_ch": chosen.stride(1), "stride_cn": 1, "HEADS": 1, "BLOCK": BLOCK,
            },
        )  # fmt: skip
        shared = shared_arguments(
            voting, keys[:, :, sinks:], scaling=1.0, positions=None, query_positions=None, starts=None, lengths=None,
            slots=0, softcap=None, keys_scale=None if keys_scale is None else keys_scale[:, :, sinks:],
            temperature=1.0, noise_seed=None,
        )  # fmt: skip
        del shared["entries"]
        block_m = block_rows(group, shared["ARITHMETIC"] == FULL)
        self._blocks = -(-group // block_m)
        self._score = PreparedLaunch(mass_kernels.lse_kernel, {**shared, "BLOCK_M": block_m, "SKIP": False})
        self._vote = PreparedLaunch(
            vote_kernels.vote_kernel,
            {"query_heads": heads, "rows": batch * heads, "BLOCK_H": BLOCK_HEADS, "BLOCK_N": BLOCK_SLOTS},
        )
        self._choosing = {
            "cosines": cosines, "former": former, "live": live, "chosen": chosen, "threshold": least,
            "length": length, "count": chosen.shape[2], "sinks": sinks, "local": local, **row,
            "DIM": dim, "ENDS": BLOCK, "num_warps": triton_best.WARPS,
        }  # fmt: skip
        self._count = chosen.shape[2]
        self._by_size: dict[tuple[bool, int, bool], PreparedLaunch] = {}  # by how many scores a program holds

    def tensors(self) -> list[Tensor]:
        """What is held beside the arguments."""
        return self._own

    def __call__(self, query: Tensor, slots: int) -> tuple[Tensor, bool]:
        """See `PreparedVote.choose`."""
        batch, heads = self._heads
        index = torch.empty(self._shape, dtype=torch.int64, device=query.device)
        with on_device(query):
            self._look((batch, 1, 1), query=query)
            again = all(cosine >= self._threshold for cosine in self._cosines.tolist())
            if again:
                self._list((-(-index.shape[-1] // BLOCK), batch, 1), output=index, slots=slots)
                return index, True
            candidates = slots - self._ends
            parts = plan_splits(query, self._blocks * self._pairs, candidates)
            single: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
            scores, votes = torch.empty(batch, heads, candidates, **single), torch.empty(batch, candidates, **single)
            lse = torch.empty(parts, batch, heads, 1, **single)
            self._score(
                (self._blocks, self._pairs, parts), lse=lse, scores_out=scores, entries=candidates, splits=parts
            )
            self._vote(
                (-(-candidates // BLOCK_SLOTS), batch, 1),
                scores=scores, lse=lse, output=votes, slots=candidates, parts=parts,
            )  # fmt: skip
            votes, places = best_of_pieces(votes, self._count)
            self._choose(votes.shape[-1], places is not None)(
                (batch, 1, 1),
                votes=votes, places=places, query=query, output=index, candidates=votes.shape[-1], slots=slots,
            )  # fmt: skip
        return index, False

    def _choose(self, scores: int, listed: bool) -> PreparedLaunch:
        """What chooses the best of so many scores, which are `listed` with their places or lie in order."""
        constants = triton_best.best_arguments(scores)
        kind = (listed, constants["BLOCK"], constants["ONCE"])
        found = self._by_size.get(kind)
        if found is None:
            found = self._by_size[kind] = PreparedLaunch(triton_kernels.choose_kernel, self._choosing | constants)
        return found
