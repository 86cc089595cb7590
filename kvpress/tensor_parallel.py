"""Tensor parallelism: the KV heads of each layer are shared out among processes, and some decisions are about all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch
import torch.distributed
from torch import Tensor

from kvpress.errors import UnsupportedModelError
from kvpress.support import expands_keys

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedConfig, PreTrainedModel

    from kvpress.assembly import Policies


@dataclass(frozen=True)
class HeadShards:
    """The share of a layer's KV heads that this process holds: the `rank`-th of `size` equal ones, in the order of the heads.

    Every process of the group calls `sum` and `gather` alike and in the same order. That holds for a policy that asks for them whenever it
    is asked, as long as all KV heads hold as many tokens.

    Attributes:
        group: the processes; `None` for one alone.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadShards:
        return self

    def first(self, heads: int) -> int:
        """Number, among all heads of the model, of the first of this process's `heads`."""
        return self.rank * heads

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors of one shape: the same bits in all of them, as all-reduce promises."""
        if self.size == 1:
            return tensor
        total = tensor.contiguous().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def gather(self, scores: Tensor, fill: float) -> Tensor:
        """`[batch, kv_heads, slots]` of all heads, from those of this process.

        Processes may hold unequal numbers of slots: shorter ones are filled up in front, where the oldest tokens lie, with `fill`.
        """
        if self.size == 1:
            return scores
        longest = torch.tensor([scores.shape[-1]], device=scores.device)
        torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=self.group)
        padded = torch.nn.functional.pad(scores, (int(longest) - scores.shape[-1], 0), value=fill).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded, group=self.group)
        return torch.cat(parts, dim=1)

    def own(self, per_head: numpy.ndarray) -> numpy.ndarray:
        """Of `[batch, all KV heads]` the columns of this process."""
        heads = per_head.shape[1] // self.size
        return per_head[:, self.first(heads) : self.first(heads) + heads]

    def check(self, kv_heads: int, config: PreTrainedConfig) -> None:
        """Raise `UnsupportedModelError` unless a layer with `kv_heads` KV heads here is an equal share of the model's."""
        total = getattr(config, "num_key_value_heads", None)
        if self.size > 1 and isinstance(total, int) and kv_heads * self.size != total:
            raise UnsupportedModelError(
                f"tensor_parallel must split the {total} KV heads of the model into {self.size} equal parts, a layer came with {kv_heads}"
            )


ALONE = HeadShards()


def head_shards(model: PreTrainedModel, group: ProcessGroup | None, policies: Policies) -> HeadShards:
    """How the KV heads of `model` are shared out.

    Args:
        group: of the processes that share them, where the model does not say so itself. A model that transformers loaded with
            `tp_plan="auto"` (or a `distributed_config`) does.
        policies: of the cache.

    Raises:
        UnsupportedModelError: heads that cannot be shared out equally, latents, or policies that decide over heads which keep different
            tokens.
    """
    config = model.config.get_text_config(decoder=True)
    if group is None:
        group = _group_of(model, config)
    if group is None or torch.distributed.get_world_size(group) == 1:
        return ALONE
    if expands_keys(config):
        raise UnsupportedModelError(
            f"model type {config.model_type!r} makes the keys of all heads of what is cached: tensor parallelism does not share it out"
        )
    eviction, selection = policies.eviction, policies.selection
    if eviction.same_for_all_heads and eviction.budgets_by_head:
        raise UnsupportedModelError(
            f"budget of {eviction.name} must be the same for all KV heads under tensor parallelism, got {eviction.budget!r}"
        )
    if selection is not None and selection.selects_for_all_heads and not eviction.heads_agree:
        raise UnsupportedModelError(
            f"{selection.name} lets all KV heads choose together, which under tensor parallelism needs an eviction policy that keeps the "
            f"same tokens for all of them, {eviction.name} does not"
        )
    return HeadShards(torch.distributed.get_rank(group), torch.distributed.get_world_size(group), group)


def _group_of(model: PreTrainedModel, config: PreTrainedConfig) -> ProcessGroup | None:
    """The processes among which transformers split the attention heads of `model`; `None` where each has all of them."""
    size = getattr(model, "_tp_size", None) or 1
    if size == 1:
        return None
    from transformers.distributed.tensor_parallel import get_kv_heads_per_rank

    heads = config.num_key_value_heads
    here = get_kv_heads_per_rank(model.tp_plan or {}, heads, size)
    if here == heads:
        return None
    if here is None:
        raise UnsupportedModelError(
            f"tensor parallelism over {size} processes must divide the {heads} KV heads equally"
        )
    meshes: Any = model._mesh_manager
    group: ProcessGroup = meshes.get_mesh("tp").get_group()
    return group
