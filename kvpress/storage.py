"""Saved caches: a directory with a block file for each layer (`kvpress.offload.format`: safetensors whose checksum covers every byte) that
holds its tensors, and `cache.json` with everything else. No pickle."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvpress.codec import decode, encode
from kvpress.errors import CacheFormatError, CacheStateError
from kvpress.layer import PolicyLayer
from kvpress.offload.errors import TierError
from kvpress.offload.format import load_block, write_block
from kvpress.offload.key import BlockKey
from kvpress.offload.layout import BlockLayout
from kvpress.offload.store import FileStore
from kvpress.placement import layer_devices
from kvpress.policies.registry import policy_class

if TYPE_CHECKING:
    from kvpress.cache import PolicyCache

TYPE, VERSION = "kvpress.PolicyCache", 3
FACTS = "cache.json"
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
    for layer in cache.policy_layers:
        if layer.stowage is not None:
            layer.stowage.check_whole()
    if cache.seen_tokens == 0:
        raise CacheStateError("the cache is empty: there is nothing to save")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"directory must be new or empty, {str(directory)!r} is not")
    made = not directory.exists()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    store, written = FileStore(directory.resolve()), list[str]()
    identity = secrets.token_hex(16)
    try:
        layers = [_save_layer(store, layer, _key(identity, index), written) for index, layer in enumerate(cache.layers)]
        facts = {
            "_type": TYPE,
            "_version": VERSION,
            "identity": identity,
            "policies": [policy.to_dict() for policy in cache.policies.given],
            "kv_dtype": cache.kv_dtype,
            "config": _config_facts(cache.config),
            "heads": [cache.heads.rank, cache.heads.size],
            "layers": layers,
        }
        facts["checksum"] = checksum(facts)
        _write_text(directory / f"{FACTS}.partial", json.dumps(facts))
        (directory / f"{FACTS}.partial").replace(directory / FACTS)  # last: a cache is whole when it is there
    except BaseException:
        for name in written:
            store.unlink(name)
        (directory / f"{FACTS}.partial").unlink(missing_ok=True)
        if made:
            directory.rmdir()
        raise
    finally:
        store.close()


def _key(identity: str, layer: int) -> BlockKey:
    """Of the file of a layer."""
    return BlockKey(identity, layer, 0, context=TYPE)


def _save_layer(store: FileStore, layer: Any, key: BlockKey, written: list[str]) -> dict[str, Any]:
    """Write the tensors of one layer, if it has any, and return what `cache.json` says of it."""
    if isinstance(layer, PolicyLayer):
        layer.commit()
    tensors: dict[str, Tensor] = {}
    state = encode(layer.state() if isinstance(layer, PolicyLayer) else vars(layer), "layer", tensors)
    if tensors:
        write_block(store, key.digest, key.description(), BlockLayout.of(tensors), tensors)
        written.append(key.digest)
    return {"class": type(layer).__name__, "state": state, "tensors": len(tensors)}


def _load_tensors(store: FileStore, key: BlockKey, count: int) -> dict[str, Tensor]:
    """The `count` tensors of one layer, each in memory of its own.

    Raises:
        CacheFormatError: the file is missing, damaged, or another one.
    """
    if not count:
        return {}
    try:
        description, views = load_block(store, key.digest, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    except TierError as error:
        raise CacheFormatError(f"the file of layer {key.layer} cannot be read: {error.reason}") from error
    if description != key.description() or len(views) != count:
        raise CacheFormatError(f"the file of layer {key.layer} holds another block: {description}")
    with torch.inference_mode(False):
        return {name: view.clone() for name, view in views.items()}


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
    store = FileStore(directory.resolve())
    try:
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
            tensors = _load_tensors(store, _key(facts["identity"], index), saved["tensors"])
            state = decode(saved["state"], tensors, devices.get(index, model.device))
            if isinstance(layer, PolicyLayer):
                layer.load_state(state)
            else:
                vars(layer).update(state)
    except CacheFormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CacheFormatError(
            f"the saved cache in {str(directory)!r} is damaged: {type(error).__name__}: {error}"
        ) from error
    finally:
        store.close()
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
    expected = {
        "_type": str,
        "_version": int,
        "checksum": str,
        "identity": str,
        "policies": list,
        "config": dict,
        "layers": list,
    }
    only = {"_type": TYPE, "_version": VERSION}
    for field, kind in expected.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(field), kind):
            raise CacheFormatError(f"{field} of {FACTS} is missing or of another type")
        if facts[field] != only.get(field, facts[field]):
            raise CacheFormatError(f"{field} must be {only[field]!r}, got {facts[field]!r}")
    if facts["checksum"] != checksum(facts):
        raise CacheFormatError(f"{FACTS} is damaged: its checksum does not match")
    return dict(facts)


def checksum(facts: dict[str, Any]) -> str:
    """Of what `cache.json` says, in hex: XXH3 of its canonical text, the checksum itself aside."""
    text = json.dumps({name: value for name, value in facts.items() if name != "checksum"}, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _config_facts(config: PreTrainedConfig) -> dict[str, Any]:
    facts = {field: getattr(config, field, None) for field in _CONFIG_FIELDS}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def _write_text(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
