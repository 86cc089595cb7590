"""The layers of a cache, and the attention of its model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from kvpress.delegates import NAME, remember
from kvpress.errors import UnsupportedModelError
from kvpress.layer import PolicyLayer
from kvpress.policies.base import EvictionPolicy, Policy
from kvpress.policies.selection import SelectionPolicy
from kvpress.reading import Reader
from kvpress.rope import Rotation
from kvpress.row_format import RowFormat
from kvpress.support import check_config, expands_keys
from kvpress.token_ids import TokenIds
from kvpress.tokens import TokenClock


@dataclass(frozen=True)
class Policies:
    """The policies of a cache."""

    eviction: EvictionPolicy
    selection: SelectionPolicy | None = None

    @property
    def given(self) -> list[Policy]:
        """Them as a list."""
        return [self.eviction] if self.selection is None else [self.eviction, self.selection]

    @property
    def need_queries(self) -> bool:
        """Whether only our attention function can serve them."""
        return self.eviction.needs_queries or self.eviction.reindexes or self.selection is not None

    @property
    def stock_refusal(self) -> str | None:
        """Why a stock attention cannot serve them, or `None`."""
        names = " and ".join(repr(policy.name) for policy in self.given)
        if self.need_queries:
            return f"policy {names} needs queries, which only the attention implementation {NAME!r} hands over"
        if type(self.eviction).allocate is not EvictionPolicy.allocate:
            return f"policy {names} gives layers or heads budgets of their own, which only the attention implementation {NAME!r} can read"
        return None

    @property
    def reindex(self) -> bool:
        """Whether attention runs over positions 0 … n-1."""
        return self.eviction.reindexes or (self.selection is not None and self.selection.reindexes)

    def for_model(self, model: PreTrainedModel) -> Policies:
        """With what the model tells its policies."""
        return replace(self, eviction=self.eviction.for_model(model))


def make_layers(
    config: PreTrainedConfig, policies: Policies, model: PreTrainedModel | None, form: RowFormat
) -> list[Any]:
    """One layer per layer of the model: ours for full attention, with rows stored as `form` says; transformers' own for the others.

    Raises:
        UnsupportedModelError: a model that cannot be served rightly, or has no layer to compress.
    """
    check_config(config)
    types, arguments = get_layer_types_and_kwargs(config)
    compressed = [index for index, kind in enumerate(types) if kind == "full_attention"]
    if not compressed:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has no full-attention layer to compress: {sorted(set(types))}"
        )
    if (policies.selection is not None or policies.reindex) and "dummy" in types:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} shares keys between layers: {policies.given[-1].name} cannot select or re-index for it"
        )
    rotation = Rotation(model) if policies.reindex and model is not None else None
    token_ids = TokenIds(model) if policies.eviction.needs_token_ids and model is not None else None
    clock, shared = TokenClock(), dict[str, Any]()
    layers: list[Any] = []
    for index, (kind, kwargs) in enumerate(zip(types, arguments, strict=True)):
        if kind != "full_attention":
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
            continue
        place = (index, compressed.index(index), len(compressed))
        reader = None
        if policies.selection is not None or rotation is not None:
            selector = None if policies.selection is None else policies.selection.selector(*place, shared)
            reader = Reader(policies.selection, selector, rotation, policies.eviction.heads_agree)
        layers.append(
            PolicyLayer(
                policies.eviction,
                *place,
                clock,
                reader=reader,
                token_ids=token_ids,
                form=form,
                expands_keys=expands_keys(config),
            )
        )
    return layers


def use_our_attention(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Set the attention implementation of the part of `model` that `config` describes, and note the former one.

    Raises:
        UnsupportedModelError: a model that does not use transformers' attention interface.
    """
    former = config._attn_implementation
    nested = [name for name in getattr(model.config, "sub_configs", {}) if getattr(model.config, name, None) is config]
    model.set_attn_implementation({nested[0]: NAME} if nested else NAME)
    if config._attn_implementation != NAME:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} does not take its attention from transformers' attention interface: "
            "PolicyCache.from_config(model.config, policy) serves it with policies that need no queries"
        )
    remember(config, former)
