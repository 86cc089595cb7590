"""Saved caches: a directory with `cache.safetensors` (every tensor) and `cache.json` (everything else, with a checksum). No pickle."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvpress.codec import decode, encode
from kvpress.errors import CacheFormatError, CacheStateError
from kvpress.layer import PolicyLayer
from kvpress.placement import layer_devices
from kvpress.policies.registry import policy_class

if TYPE_CHECKING:
    from kvpress.cache import PolicyCache

TYPE, VERSION = "kvpress.PolicyCache", 2
TENSORS, FACTS = "cache.safetensors", "cache.json"
_CONFIG_FIELDS = (  # what must agree for keys and values to mean the same
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "head_dim",
    "vocab_size",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "kv_lora_rank",
)


def save_cache(cache: PolicyCache, directory: Path) -> None:
    """Write `cache` to a new or empty `directory`; on failure nothing of it is left.

    Raises:
        CacheStateError: an unfinished forward, or an empty cache.
        ValueError: a directory with something in it.
    """
    if any(layer.forward is not None for layer in cache.policy_layers):
        raise CacheStateError("a forward broke off: there is no whole cache to save. Call cache.reset()")
    if cache.seen_tokens == 0:
        raise CacheStateError("the cache is empty: there is nothing to save")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"directory must be new or empty, {str(directory)!r} is not")
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PolicyLayer):
            layer.commit()
        state = layer.state() if isinstance(layer, PolicyLayer) else vars(layer)
        layers.append({"class": type(layer).__name__, "state": encode(state, f"layer.{index}", tensors)})
    made = not directory.exists()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        partial = directory / f"{TENSORS}.partial"
        save_file(tensors, partial)
        facts = {
            "_type": TYPE,
            "_version": VERSION,
            "policies": [policy.to_dict() for policy in cache.policies.given],
            "kv_dtype": cache.kv_dtype,
            "config": _config_facts(cache.config),
            "heads": [cache.heads.rank, cache.heads.size],
            "sha256": _digest(partial),
            "layers": layers,
        }
        _write_text(directory / f"{FACTS}.partial", json.dumps(facts))
        for name in (TENSORS, FACTS):  # the facts last: a cache is whole when they are there
            (directory / f"{name}.partial").replace(directory / name)
    except BaseException:
        for name in (TENSORS, FACTS, f"{TENSORS}.partial", f"{FACTS}.partial"):
            (directory / name).unlink(missing_ok=True)
        if made:
            directory.rmdir()
        raise


def load_cache(directory: Path, model: PreTrainedModel) -> PolicyCache:
    """Read a cache that `save_cache` wrote, for a model of the same configuration.

    Raises:
        CacheFormatError: a missing or damaged file, another format or version, or another model; names the field.
    """
    from kvpress.cache import PolicyCache

    facts = _read_facts(directory)
    config = model.config.get_text_config(decoder=True)
    for field, value in _config_facts(config).items():
        saved = facts["config"].get(field)
        if saved != value:
            raise CacheFormatError(
                f"{field} of the model must be {saved!r}, as when the cache was saved, got {value!r}"
            )
    path = directory / TENSORS
    if not path.is_file():
        raise CacheFormatError(f"{TENSORS} is missing in {str(directory)!r}")
    if _digest(path) != facts["sha256"]:
        raise CacheFormatError(f"{TENSORS} is damaged: its sha256 is not the one in {FACTS}")
    try:
        tensors = load_file(path)
        policies = [policy_class(given["name"]).from_dict(given) for given in facts["policies"]]
        cache = PolicyCache(model, policies, kv_dtype=facts.get("kv_dtype"))
        share, held = facts.get("heads", [0, 1]), [cache.heads.rank, cache.heads.size]
        if share != held:
            raise CacheFormatError(
                f"heads must be share {share} (rank, processes) of the KV heads, this process holds {held}"
            )
        devices = layer_devices(model)
        if len(facts["layers"]) != len(cache.layers):
            raise CacheFormatError(f"layers must be {len(cache.layers)}, got {len(facts['layers'])}")
        for index, (layer, saved) in enumerate(zip(cache.layers, facts["layers"], strict=True)):
            if saved["class"] != type(layer).__name__:
                raise CacheFormatError(f"class of layer {index} must be {type(layer).__name__}, got {saved['class']!r}")
            state = decode(saved["state"], tensors, devices.get(index, model.device))
            if isinstance(layer, PolicyLayer):
                layer.load_state(state)
            else:
                vars(layer).update(state)
    except CacheFormatError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CacheFormatError(
            f"the saved cache in {str(directory)!r} is damaged: {type(error).__name__}: {error}"
        ) from error
    return cache


def _read_facts(directory: Path) -> dict[str, Any]:
    path = directory / FACTS
    if not path.is_file():
        raise CacheFormatError(f"{FACTS} is missing in {str(directory)!r}: not a saved cache, or its writing broke off")
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(f"{FACTS} is damaged: {error}") from error
    expected: dict[str, type | tuple[type, ...]]
    expected = {"_type": str, "_version": int, "policies": list, "config": dict, "sha256": str, "layers": list}
    for field, kind in expected.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(field), kind):
            raise CacheFormatError(f"{field} of {FACTS} is missing or of another type")
    for field, value in (("_type", TYPE), ("_version", VERSION)):
        if facts[field] != value:
            raise CacheFormatError(f"{field} must be {value!r}, got {facts[field]!r}")
    return dict(facts)


def _config_facts(config: PreTrainedConfig) -> dict[str, Any]:
    facts = {field: getattr(config, field, None) for field in _CONFIG_FIELDS}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
