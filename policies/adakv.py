"""AdaKV: SnapKV with the tokens of a layer shared out among its heads by need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvpress.policies.base import check_share
from kvpress.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from kvpress.observation import Observation


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's votes; heads whose attention is spread over many tokens keep more, heads that look at few keep fewer.

    Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    arXiv 2407.11550. The `kv_heads * (budget - window)` best votes of a layer are counted per KV head; a head gets
    `1 - floor` of its count and `floor` of the mean. What heads do not keep is freed: their buffers are not equally
    long.

    The budgets of a layer's heads add up to `kv_heads * budget` exactly: tokens left over by rounding go to the largest
    fractions, of equal ones to the first head. A prompt allocates; decoded tokens keep to it.

    Args:
        budget: mean tokens kept per KV head of a layer, window included.
        floor: share of the mean that every head gets.
        window, kernel_size, pooling, group_reduce: as in SnapKV.
    """

    name: ClassVar[str] = "adakv"
    summary: ClassVar[str] = "as SnapKV, with more tokens for the heads that need them"
    paper: ClassVar[str] = "arXiv 2407.11550"
    fails: ClassVar[str] = (
        "as SnapKV; a head that looked unimportant to the prompt and matters later has few tokens left"
    )

    shares_out: ClassVar[str | None] = "heads"

    floor: float = 0.2

    def __post_init__(self) -> None:
        check_share(self.name, "floor", self.floor)
        super().__post_init__()

    def allocate(self, observation: Observation, budgets: Sequence[int]) -> list[list[int]]:
        candidates = (observation.positions >= 0) & ~observation.in_window(self.window)
        votes = observation.columns["votes"].nan_to_num(nan=0.0).masked_fill(~candidates, -1.0)
        votes = observation.heads.gather(votes, -1.0)
        held = (votes >= 0).sum(dim=(1, 2)).tolist()
        return [
            self._head_budgets(votes[row], budget, tokens)
            for row, (budget, tokens) in enumerate(zip(budgets, held, strict=True))
        ]

    def _head_budgets(self, votes: Tensor, budget: int, held: int) -> list[int]:
        """Budgets of one batch row's heads: `votes [kv_heads, slots]`, -1 for what is none of the `held` candidates."""
        kv_heads, slots = votes.shape
        mean = budget - self.window
        if mean <= 0 or kv_heads * mean >= held:
            return [budget] * kv_heads
        best = votes.flatten().sort(descending=True, stable=True).indices[: kv_heads * mean]
        counts = torch.bincount(best // slots, minlength=kv_heads).tolist()
        shares = [count * (1 - self.floor) + mean * self.floor for count in counts]
        whole = [int(share + 1e-9) for share in shares]
        order = sorted(range(kv_heads), key=lambda head: (round(whole[head] - shares[head], 9), head))
        for head in order[: kv_heads * mean - sum(whole)]:
            whole[head] += 1
        return [self.window + tokens for tokens in whole]
