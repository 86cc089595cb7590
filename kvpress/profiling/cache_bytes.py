"""What a cache of any class holds: logical bytes, bytes of its storages, and those of a full cache, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from kvpress.cache import PolicyCache, layer_nbytes
from kvpress.layer import PolicyLayer


@dataclass(frozen=True)
class LayerBytes:
    """One layer.

    Attributes:
        layer: index in the model.
        kind: policy, or class of transformers' layer.
        kept_tokens: mean over batch rows and KV heads; `None` for a layer that is not of a number of tokens.
        logical_bytes: keys and values of the tokens kept.
        held_bytes: storages: room for coming tokens, positions, a policy's columns and whatever else it holds are in it.
        full_bytes: what a full cache would hold.
    """

    layer: int
    kind: str
    kept_tokens: float | None
    logical_bytes: int
    held_bytes: int
    full_bytes: int


@dataclass(frozen=True)
class CacheBytes:
    """The sums over the layers, and the layers. `held_bytes` of a `PolicyCache` is its `nbytes`.

    Attributes:
        tiers: with offload the bytes in each tier, the nearest first; the files of the disk tier are in none of the other figures.
    """

    logical_bytes: int
    held_bytes: int
    full_bytes: int
    layers: tuple[LayerBytes, ...]
    tiers: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}


def cache_bytes(cache: Any) -> CacheBytes:
    """What `cache` holds now.

    Args:
        cache: a `PolicyCache`, or any cache of transformers made of layers.

    Raises:
        TypeError: a cache that has no layers.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise TypeError(f"cache must be a transformers cache made of layers, got {type(cache).__name__}")
    rows = tuple(_layer_bytes(index, layer) for index, layer in enumerate(layers))
    logical, full = sum(row.logical_bytes for row in rows), sum(row.full_bytes for row in rows)
    held = cache.nbytes if isinstance(cache, PolicyCache) else sum(row.held_bytes for row in rows)
    return CacheBytes(logical, held, full, rows, bytes_in_tiers(cache))


def bytes_in_tiers(cache: Any) -> dict[str, int]:
    """Bytes in each tier of an offloaded cache, the nearest first; none for any other cache."""
    tiers = cache.tiers.statistics() if isinstance(cache, PolicyCache) and cache.tiers is not None else {}
    return {name: found.bytes for name, found in tiers.items()}


def _layer_bytes(index: int, layer: Any) -> LayerBytes:
    held = layer_nbytes(layer)
    if isinstance(layer, PolicyLayer):
        tokens = layer.table.held
        if not tokens.size:
            return LayerBytes(index, layer.policy.name, 0.0, 0, held, 0)
        logical = int(tokens.sum()) * layer.table.kv_bytes_per_token // tokens.size
        return LayerBytes(index, layer.policy.name, float(tokens.mean()), logical, held, layer.full_nbytes)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        return LayerBytes(index, type(layer).__name__, None, held, held, held)
    logical = keys.numel() * keys.element_size() + values.numel() * values.element_size()
    tokens_kept = float(keys.shape[-2]) if keys.dim() == 4 else 0.0
    return LayerBytes(index, type(layer).__name__, tokens_kept, logical, held, held)
