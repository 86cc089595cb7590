"""One forward of a prompt for the caches of many policies.

An eviction policy attends to every token of a prompt that comes in one forward, and evicts at the end of each layer; a selection
policy that selects for decoded tokens alone keeps them all. So what the model computes is the same for all of them: one forward
serves them all, and each cache holds what it would hold after its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvpress import PolicyCache
from kvpress.cache_argument import passed
from kvpress.forward import Forward
from kvpress.layer import PolicyLayer
from kvpress.observation import AttentionArguments
from kvpress.policies.full import Full
from kvpress.slots import SlotTable
from kvpress.tokens import Tokens

from .clock import now


@dataclass(frozen=True)
class Prefilled:
    """What a shared prefill leaves beside the caches.

    Attributes:
        logits: `[vocabulary]` of the token after the prompt; the same for every cache, nothing was evicted before.
        seconds: of wall clock, for each cache: the forward without the policies, and the work of its own policy.
    """

    logits: Tensor
    seconds: tuple[float, ...]


def can_share(cache: Cache) -> bool:
    """Whether `cache` reads a prompt of one forward as a full cache does.

    Not so where a policy selects for prompts or re-indexes positions, and where some layers are not compressed. With offload a cache
    reads alone: limits of memory are for one cache at a time.
    """
    return (
        isinstance(cache, PolicyCache)
        and cache.tiers is None
        and (cache.policies.selection is None or not cache.policies.selection.selects_for_prompts)
        and not cache.policies.reindex
        and all(isinstance(layer, PolicyLayer) for layer in cache.layers)
    )


@torch.no_grad()
def prefill_together(model: PreTrainedModel, caches: Sequence[Cache], ids: Sequence[int]) -> Prefilled:
    """Feed a prompt of at least two tokens to `model` once, and to all `caches`, which must be empty.

    Raises:
        ValueError: a cache that cannot share or is not empty, or fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"ids must hold at least 2 tokens, not {len(ids)}")
    for cache in caches:
        if not can_share(cache) or cache.get_seq_length():
            raise ValueError(f"caches must be empty, and attend to all of a prompt, got {cache!r}")
    followers = cast(Sequence[PolicyCache], caches)
    lead = _Lead(model, followers)
    batch = torch.tensor([ids], device=model.device)
    start = now(model.device)
    output = model(
        batch, attention_mask=torch.ones_like(batch), **passed(model, lead), use_cache=True, logits_to_keep=1
    )
    total = now(model.device) - start
    own = [sum(layer.seconds[row] for layer in lead.leads) for row in range(len(followers))]
    return Prefilled(output.logits[0, -1], tuple(total - sum(own) + seconds for seconds in own))


class _Lead(PolicyCache):
    """Reads the prompt for its followers, and keeps nothing itself."""

    def __init__(self, model: PreTrainedModel, followers: Sequence[PolicyCache]) -> None:
        super().__init__(model, Full())
        self.leads = [
            _LeadLayer(layer, [follower.policy_layers[ordinal] for follower in followers])
            for ordinal, layer in enumerate(self.policy_layers)
        ]
        self._fill(self.config, self.policies, list[Any](self.leads))


class _LeadLayer(PolicyLayer):
    """A layer whose forward is also that of its followers: they are told every step of it.

    They do none of its attention, but where a selection learns from it.
    """

    def __init__(self, layer: PolicyLayer, followers: Sequence[PolicyLayer]) -> None:
        super().__init__(
            layer.policy, layer.layer_idx, layer.ordinal, layer.layers, layer.clock, expands_keys=layer.expands_keys
        )
        self.followers = followers
        self.seconds = [0.0] * len(followers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; every follower's table takes in the same tensors, without a copy."""
        returned = super().update(key_states, value_states)
        for follower in self.followers:
            follower.update(key_states, value_states)
        return returned

    def place(self, forward: Forward, mask: Tensor | None, device: torch.device, ids: Tensor | None = None) -> Tokens:
        """Place the tokens, in every follower too."""
        for follower in self.followers:
            follower.place(follower.running, mask, device, ids)
        return super().place(forward, mask, device, ids)

    def attend(
        self, forward: Forward, query: Tensor, keys: Tensor, values: Tensor, arguments: AttentionArguments
    ) -> Tensor:
        """Attention over all tokens."""
        for row, follower in enumerate(self.followers):
            if follower.reader is not None:
                start = now(keys.device)
                follower.attend(follower.running, query, keys, values, arguments)
                self.seconds[row] += now(keys.device) - start
        return super().attend(forward, query, keys, values, arguments)

    def finish(self, forward: Forward, query: Tensor | None, keys: Tensor, arguments: AttentionArguments) -> None:
        """Every follower observes and evicts as at the end of its own forward."""
        self.forward = None
        if self.ordinal == self.layers - 1:
            self.clock.clear()
        for row, follower in enumerate(self.followers):
            start = now(keys.device)
            follower.finish(follower.running, query, keys, arguments)
            self.seconds[row] += now(keys.device) - start
        self.table = SlotTable()
