"""Calibration: parameters that are found by looking at a model at work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.cache import PolicyCache
from kvpress.cache_argument import passed
from kvpress.kernels.scores import slot_scores
from kvpress.observation import Observation
from kvpress.policies.base import EvictionPolicy, check_integer
from kvpress.policies.budget import BudgetValue

ROWS = 16  # last tokens of a text that stand for decoded ones


def reselect_layer(model: PreTrainedModel, input_ids: Tensor, top_k: int = 256, dense_layers: int = 2) -> int:
    """The layer at which `TidalDecode(reselect_layer=…)` should select again, for this model.

    The last 16 tokens of each text stand for decoded ones. Every layer chooses the `top_k` tokens of largest dot product, as TidalDecode
    does. A layer `l` that attends to the choice of layer `c` is *covered* by the share `mass_l(chosen by c) / mass_l(chosen by l)` of the
    attention weight that its own choice would hold. Returned is the layer that makes the mean over all sparse layers largest: those before
    it follow layer `dense_layers`, those after it follow itself. The paper finds one layer a model family, the same over tasks (arXiv
    2410.05076); a text of a few thousand tokens of the kind to be served will do.

    Args:
        model: a decoder model that `PolicyCache` serves.
        input_ids: `[batch, tokens]` int64, no padding, more than `top_k` tokens.
        top_k, dense_layers: as `TidalDecode` will have them.

    Returns:
        Index among the compressed layers, above `dense_layers`.

    Raises:
        ValueError: a text that is not longer than `top_k`, or a model with no layer left to follow.
    """
    return int(coverage(model, input_ids, top_k, dense_layers).argmax()) + dense_layers + 1


def coverage(model: PreTrainedModel, input_ids: Tensor, top_k: int = 256, dense_layers: int = 2) -> Tensor:
    """What `reselect_layer` compares: for each layer after `dense_layers`, the mean coverage if it selects again. Same arguments.

    Returns:
        `[compressed layers - dense_layers - 1]` fp32 in [0, 1] but for a group whose other heads would choose better.
    """
    check_integer("calibration", "top_k", top_k, 1)
    check_integer("calibration", "dense_layers", dense_layers, 0)
    if input_ids.dim() != 2 or input_ids.shape[1] <= top_k:
        raise ValueError(
            f"input_ids must be [batch, tokens] with more than top_k={top_k} tokens, got {tuple(input_ids.shape)}"
        )
    probe = _Probe(top_k=top_k)
    cache = PolicyCache(model, probe)
    layers = len(cache.policy_layers)
    if layers < dense_layers + 2:
        raise ValueError(f"dense_layers must leave two of the model's {layers} compressed layers, got {dense_layers}")
    with torch.no_grad():
        model(input_ids.to(model.device), **passed(model, cache), use_cache=True)
    share = torch.ones(layers, layers)  # [choosing, following]
    for chooser in range(dense_layers, layers):
        for follower in range(chooser + 1, layers):
            share[chooser, follower] = _covered(probe.seen[chooser], probe.seen[follower])
    first = [share[dense_layers, dense_layers + 1 : again].sum() for again in range(dense_layers + 1, layers)]
    later = [share[again, again + 1 :].sum() for again in range(dense_layers + 1, layers)]
    sparse = max(layers - dense_layers - 2, 1)  # the two that choose attend to everything
    return (torch.stack(first) + torch.stack(later)) / sparse


def _covered(chooser: tuple[Tensor, Tensor], follower: tuple[Tensor, Tensor]) -> Tensor:
    """Attention weight of `follower` on the choice of `chooser`, as a share of that on its own choice."""
    weights, own = follower
    group = weights.shape[2]
    held = [
        weights.gather(-1, choice[:, :, None].expand(-1, -1, group, -1, -1)).sum(dim=-1) for choice in (chooser[1], own)
    ]
    return (held[0].sum() / held[1].sum()).float().cpu()


@dataclass(frozen=True)
class _Probe(EvictionPolicy):
    """Keeps everything, and notes for each layer the weights and the choice of the last rows."""

    name: ClassVar[str] = "calibration"
    summary: ClassVar[str] = "notes what each layer attends to"
    paper: ClassVar[str] = ""
    needs_queries: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("calibration",)  # so that forwards are observed

    budget: BudgetValue | None = field(default=None, init=False)
    top_k: int = 256
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    def observe(self, observation: Observation) -> None:
        """Weights `[batch, kv_heads, group, rows, tokens]` and the slots chosen `[batch, kv_heads, rows, top_k]`."""
        if observation.query is None or observation.keys is None or observation.query_positions is None:
            raise RuntimeError("calibration needs queries")
        arguments = observation.arguments
        rows = min(ROWS, observation.rows)
        scores = slot_scores(
            observation.query[:, :, -rows:],
            observation.keys,
            observation.positions,
            observation.query_positions[:, -rows:],
            arguments.scaling,
            arguments.softcap,
        )
        choice = scores.amax(dim=2).topk(self.top_k, dim=-1, sorted=False).indices
        self.seen[observation.ordinal] = (scores.softmax(dim=-1), choice)
