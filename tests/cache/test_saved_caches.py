"""Saved caches that cannot be read, or not be written: each says what is wrong, and leaves nothing behind."""

import json

import pytest
import torch
from safetensors.torch import load_file

import kvpress.storage
from kvpress import PolicyCache
from kvpress.codec import decode, encode
from kvpress.errors import CacheFormatError, CacheStateError
from kvpress.testing.families import random_tokens, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return tiny_model()


def used(model, policy="h2o", **parameters):
    cache = PolicyCache(model, policy, **(parameters or {"budget": 8}))
    with torch.no_grad():
        model(random_tokens(1, 20), past_key_values=cache)
    return cache


@pytest.fixture
def saved(model, tmp_path):
    used(model).save(tmp_path / "cache")
    return tmp_path / "cache"


def test_a_good_one_goes_on_as_before(model, saved):
    cache, loaded = used(model), PolicyCache.load(saved, model)
    with torch.no_grad():
        wanted, found = (model(random_tokens(1, 3, seed=1), past_key_values=each).logits for each in (cache, loaded))
    assert torch.equal(found, wanted) and wanted.std() > 0.1
    names = sorted(path.name for path in saved.iterdir())
    assert (
        len(names) == 3 and "cache.json" in names and all(path.stat().st_mode & 0o77 == 0 for path in saved.iterdir())
    )


def test_each_layer_is_a_file_that_any_safetensors_reader_opens(model, saved):
    found = [load_file(path) for path in files_of(saved)]
    cache = used(model)
    keys = [layer.table.keys for layer in cache.policy_layers]
    assert len(found) == len(keys) == 2
    for each in found:
        assert any(torch.equal(each["layer.table.keys"], own) for own in keys)


def test_no_flipped_byte_is_read(model, saved):
    """Some of each file: `kvpress.offload.format` is tested at every byte."""
    for path in files_of(saved):
        data = path.read_bytes()
        for place in range(0, len(data), max(len(data) // 40, 1)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(CacheFormatError, match="the file of layer"):
                PolicyCache.load(saved, model)
        path.write_bytes(data)
    PolicyCache.load(saved, model)
    text = (saved / "cache.json").read_text()
    digits = [place for place, character in enumerate(text) if character.isdigit()]
    for place in digits[:: len(digits) // 40]:
        (saved / "cache.json").write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        with pytest.raises(CacheFormatError):
            PolicyCache.load(saved, model)


def test_tensors_of_a_loaded_cache_hold_no_memory_of_others(model, saved):
    loaded = PolicyCache.load(saved, model)
    assert loaded.nbytes <= used(model).nbytes
    storages = {
        t.untyped_storage().data_ptr() for layer in loaded.policy_layers for t in layer.table.tensors() if t is not None
    }
    assert len(storages) >= 8


def files_of(saved):
    return sorted(path for path in saved.iterdir() if path.name != "cache.json")


def test_layers_of_transformers_are_saved_too(tmp_path):
    model = tiny_model("gemma2")
    cache = used(model)
    cache.save(tmp_path / "cache")
    loaded = PolicyCache.load(tmp_path / "cache", model)
    with torch.no_grad():
        wanted, found = (model(random_tokens(1, 3, seed=1), past_key_values=each).logits for each in (cache, loaded))
    assert torch.equal(found, wanted)


def test_what_cannot_be_saved(model, tmp_path, monkeypatch):
    with pytest.raises(CacheStateError, match="the cache is empty"):
        PolicyCache(model, "h2o", budget=8).save(tmp_path / "cache")
    cache = used(model)
    cache.policy_layers[1].forward = object()
    with pytest.raises(CacheStateError, match="a forward broke off"):
        cache.save(tmp_path / "cache")
    cache.policy_layers[1].forward = None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for place in (tmp_path / "full", tmp_path / "full" / "note.txt"):
        with pytest.raises(ValueError, match="directory must be new or empty"):
            cache.save(place)
    assert not (tmp_path / "cache").exists() and (tmp_path / "full" / "note.txt").read_text() == "mine"


def test_a_write_that_breaks_off_leaves_nothing(model, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()

    def broken(path, text):
        path.write_text(text[:20])
        raise OSError("disk full")

    monkeypatch.setattr(kvpress.storage, "_write_text", broken)
    for name in ("new", "there"):
        with pytest.raises(OSError, match="disk full"):
            used(model).save(tmp_path / name)
    assert not (tmp_path / "new").exists() and not list((tmp_path / "there").iterdir())


def changed(saved, **changes):
    facts = json.loads((saved / "cache.json").read_text()) | changes
    (saved / "cache.json").write_text(json.dumps(facts | {"checksum": kvpress.storage.checksum(facts)}))


def layers_of(saved):
    return json.loads((saved / "cache.json").read_text())["layers"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: (saved / "cache.json").unlink(), "cache.json is missing"),
        (lambda saved: files_of(saved)[0].unlink(), r"the file of layer \d cannot be read: its file has vanished"),
        (
            lambda saved: files_of(saved)[0].replace(files_of(saved)[1]),
            r"the file of layer \d (cannot be read|holds another block)",
        ),
        (lambda saved: (saved / "cache.json").write_text("{"), "cache.json is damaged"),
        (lambda saved: (saved / "cache.json").write_text("[1]"), "_type of cache.json is missing or of another type"),
        (lambda saved: (saved / "cache.json").write_text("[" * 100_000), "cache.json is damaged"),
        (lambda saved: changed(saved, _type="other"), "_type must be 'kvpress.PolicyCache', got 'other'"),
        (lambda saved: changed(saved, _version=99), f"_version must be {kvpress.storage.VERSION}, got 99"),
        (lambda saved: changed(saved, identity=None), "identity of cache.json is missing or of another type"),
        (lambda saved: changed(saved, identity="0" * 32), "the file of layer 0 cannot be read: its file has vanished"),
        (lambda saved: changed(saved, layers=layers_of(saved)[:1]), "layers must be 2, got 1"),
        (
            lambda saved: changed(saved, layers=[{**layers_of(saved)[0], "class": "Other"}, layers_of(saved)[1]]),
            "class of layer 0 must be PolicyLayer, got 'Other'",
        ),
        (lambda saved: changed(saved, layers=[{}, {}]), "is damaged: KeyError"),
        (lambda saved: changed(saved, policies=[{"name": "nobody"}]), "is damaged: ValueError: policy must be one of"),
        (lambda saved: changed(saved, heads=[1, 2]), r"heads must be share \[1, 2\] .* holds \[0, 1\]"),
    ],
)
def test_what_cannot_be_read(model, saved, change, message):
    PolicyCache.load(saved, model)
    change(saved)
    with pytest.raises(CacheFormatError, match=message):
        PolicyCache.load(saved, model)


def test_another_model(saved):
    with pytest.raises(
        CacheFormatError, match="num_hidden_layers of the model must be 2, as when the cache was saved, got 3"
    ):
        PolicyCache.load(saved, tiny_model(num_hidden_layers=3))


def test_facts_there_and_back():
    tensors = {}
    value = {"a": [1, 2.5, None, True], "b": (torch.arange(3), torch.float16, CPU), "c": "text"}
    found = decode(json.loads(json.dumps(encode(value, "x", tensors))), tensors, CPU)
    assert torch.equal(found["b"][0], value["b"][0]) and found["b"][1:] == (torch.float16, CPU)
    assert found["a"] == value["a"] and found["c"] == "text" and list(tensors) == ["x.b.0"]
    with pytest.raises(CacheFormatError, match=r"x\.y of type set cannot be saved"):
        encode({"y": {1}}, "x", {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r"state must have one tag, got \[\]"),
        ({"list": [], "tuple": []}, "state must have one tag"),
        ({"pickle": "gASV"}, "tag 'pickle' is unknown"),
        ({"dtype": "load"}, "dtype 'load' is unknown"),
        ({"dtype": "nothing"}, "dtype 'nothing' is unknown"),
    ],
)
def test_facts_that_nobody_writes(value, message):
    with pytest.raises(CacheFormatError, match=message):
        decode(value, {}, CPU)
