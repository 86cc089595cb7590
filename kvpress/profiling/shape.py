"""Sizes of a model, found by running it without memory: on torch's meta device, weights have a shape and no storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from kvpress.cache_argument import passed
from kvpress.profiling.context import weights_bytes
from kvpress.support import check_config, expands_keys

PROBE_TOKENS = 4


@dataclass(frozen=True)
class LayerShape:
    """One layer's cache.

    Attributes:
        compressed: a policy decides what it holds.
        kv_heads, key_dim, value_dim: of its keys and values as the cache stores them; 0 where it stores none.
        window: tokens it holds at most, of a sliding layer.
        state_bytes: what it holds besides for one batch row, however long the text.
    """

    compressed: bool
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    state_bytes: int

    def token_bytes(self, item: int) -> int:
        """Bytes of one token's keys and values of one batch row, `item` bytes a number."""
        return self.kv_heads * (self.key_dim + self.value_dim) * item


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        model_type: of the configuration.
        dtype: of weights and cache.
        weights_bytes: of a dense model of that type.
        layers: all of them, in order.
        query_heads, query_dim: of a layer's queries where attention meets them.
        expanded_heads: heads of the keys there, where the model makes other keys of the cached ones, else 0.
        hidden, intermediate: width of the residual stream; of what the feed-forward part holds for a token, experts added up.
        vocabulary: entries.
        window: longest text the model was made for, `None` where it does not say.
        quantized: the checkpoint's weights are not dense, so `weights_bytes` says too much.
    """

    model_type: str
    dtype: torch.dtype
    weights_bytes: int
    layers: tuple[LayerShape, ...]
    query_heads: int
    query_dim: int
    expanded_heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    window: int | None
    quantized: bool

    @property
    def compressed(self) -> list[LayerShape]:
        """The layers that a policy decides on."""
        return [layer for layer in self.layers if layer.compressed]


def read_shape(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> ModelShape:
    """The sizes of the model that `config` describes; nothing is loaded, and next to no memory is taken.

    Args:
        dtype: of weights and cache; `None` is the configuration's own, or float32.

    Raises:
        UnsupportedModelError: a model that the cache cannot serve.
    """
    text: Any = config.get_text_config(decoder=True)
    check_config(text)
    chosen = dtype or _own_dtype(config) or _own_dtype(text) or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=chosen).eval()
    cache = DynamicCache(config=text)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the default one looks at the numbers, which are not there
    with torch.no_grad():
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
        model(ids, **passed(model, cache), use_cache=True, logits_to_keep=1)
    types, _ = get_layer_types_and_kwargs(text)
    layers = [_layer_shape(kind, layer) for kind, layer in zip(types, cache.layers, strict=True)]
    heads = text.num_attention_heads
    head_dim = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        model_type=text.model_type,
        dtype=chosen,
        weights_bytes=weights_bytes(model),
        layers=tuple(layers),
        query_heads=heads,
        query_dim=head_dim,
        expanded_heads=heads if expands_keys(text) else 0,
        hidden=text.hidden_size,
        intermediate=_intermediate(text),
        vocabulary=text.vocab_size,
        window=getattr(text, "max_position_embeddings", None),
        quantized=getattr(config, "quantization_config", None) is not None,
    )


def _own_dtype(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _layer_shape(kind: str, layer: Any) -> LayerShape:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    shapes = None
    if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == 4:
        shapes = keys.shape[1], keys.shape[-1], values.shape[-1]
    kv_heads, key_dim, value_dim = shapes or (0, 0, 0)
    states = [
        tensor
        for value in vars(layer).values()
        for tensor in (value.values() if isinstance(value, dict) else [value])
        if isinstance(tensor, Tensor) and tensor is not keys and tensor is not values
    ]
    return LayerShape(
        compressed=kind == "full_attention",
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window=getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None,
        state_bytes=sum(tensor.untyped_storage().nbytes() for tensor in states),
    )


def _intermediate(config: Any) -> int:
    """Numbers of a token between the two halves of the feed-forward part: of every expert it goes through."""
    dense = int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    experts = getattr(config, "num_experts_per_tok", None)
    if not experts:
        return dense
    routed = int(experts) * int(getattr(config, "moe_intermediate_size", None) or dense)
    shared = int(getattr(config, "shared_expert_intermediate_size", None) or 0)
    return max(dense, routed + shared) if getattr(config, "first_k_dense_replace", 0) else routed + shared
