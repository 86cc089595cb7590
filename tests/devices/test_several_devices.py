"""A model on several devices: every layer's slots lie with its keys, and nothing meets on the way that lies apart."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from policy_table import ROWS

import kvpress.rope
import kvpress.token_ids
from kvpress import PolicyCache
from kvpress.errors import UnsupportedModelError
from kvpress.offload import Offload
from kvpress.policies.quest import Quest
from kvpress.policies.registry import make_policy
from kvpress.policies.tidaldecode import TidalDecode
from kvpress.policies.tokenselect import TokenSelect
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.several_devices import DeviceTensor, MixedDevicesError, SeveralDevices, counted_crossings
from kvpress.tokens import Tokens

LAYERS, NEW = 4, 5
VOTES = {"top_k": 4, "sinks": 1, "local": 4, "chunk": 4, "tail": 2}
POLICIES = {
    **{row.name: make_policy(row.name, **row.small) for row in ROWS},
    "streaming_llm, re-indexed": make_policy("streaming_llm", budget=10, sinks=2, positions="reindex"),
    "tokenselect": TokenSelect(**VOTES, positions="keep"),
    "tokenselect, re-indexed": TokenSelect(**VOTES),
    "quest": Quest(top_k=8, page_size=4, skip_layers=1),
    "tidaldecode": TidalDecode(top_k=6, dense_layers=1, reselect_layer=3),
    "h2o + quest": [make_policy("h2o", budget=14), Quest(top_k=8, page_size=4, skip_layers=1)],
}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "chunks": {"prefill_chunk_size": 7},
}


def halves(layers):
    return [f"ipu:{2 * layer // layers}" for layer in range(layers)]


def alternating(layers):
    return [f"ipu:{layer % 2}" for layer in range(layers)]


def spread(layers=LAYERS, devices=alternating):
    """A tiny model as accelerate dispatches it by a `device_map`."""
    model = tiny_model("llama", num_hidden_layers=layers)
    ends = {"model.embed_tokens": "ipu:0", "model.rotary_emb": "ipu:0", "model.norm": "ipu:1", "lm_head": "ipu:1"}
    return dispatch_model(model, {**ends, **{f"model.layers.{i}": device for i, device in enumerate(devices(layers))}})


def padded_prompt():
    ids, mask = random_tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    ids[0, :5] = mask[0, :5] = 0
    return ids, mask


def generate(model, policy, device, way="greedy", prompt=None, **options):
    ids, mask = padded_prompt() if prompt is None else prompt
    cache = PolicyCache(model, policy)
    out = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        **{**WAYS[way], **options},
    )
    return out.cpu(), cache


def same_contents(cache, expected):
    for layer in range(len(expected.layers)):
        assert torch.equal(cache.kept_positions(layer).cpu(), expected.kept_positions(layer).cpu())
        if expected.policies.selection is not None:
            assert torch.equal(cache.selected_positions(layer).cpu(), expected.selected_positions(layer).cpu())


def alone(policy, way="greedy", **options):
    """The same on one device of the same kind, so that the same kernels serve."""
    return generate(tiny_model("llama", num_hidden_layers=LAYERS).to("ipu:0"), policy, "ipu:0", way, **options)


def equals_one_device(name, way="greedy", devices=alternating):
    with SeveralDevices():
        tokens, expected = alone(POLICIES[name], way)
        found, cache = generate(spread(devices=devices), POLICIES[name], "ipu:0", way)
        assert torch.equal(found, tokens)
        for layer, device in zip(cache.policy_layers, devices(LAYERS), strict=True):
            held = [tensor for tensor in (*layer.table.tensors(), *layer.keeper.tensors()) if tensor is not None]
            assert {str(tensor.device) for tensor in held if tensor.numel()} == {device}
        same_contents(cache, expected)
        assert cache.report().to_dict() == expected.report().to_dict()


@pytest.mark.parametrize("name", list(POLICIES))
def test_layers_by_turns_on_two_devices_equal_one_device(name):
    equals_one_device(name)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("snapkv", "beams"),
        ("adakv", "beams"),
        ("tidaldecode", "beams"),
        ("sepllm", "beams"),
        ("tokenselect, re-indexed", "beams"),
        ("pyramidkv", "chunks"),
    ],
)
def test_halves_on_two_devices_equal_one_device(name, way):
    equals_one_device(name, way, halves)


@pytest.mark.parametrize("name", ["adakv", "sepllm"])
def test_prompt_lookup_takes_tokens_back_on_every_device(name):
    text = random_tokens(1, 8).repeat(1, 4)  # repeats, so that the lookup finds candidates
    prompt = (text, torch.ones_like(text))
    policy = POLICIES[name]
    with SeveralDevices():
        tokens, expected = alone(policy, prompt=prompt, prompt_lookup_num_tokens=3)
        found, cache = generate(spread(), policy, "ipu:0", prompt=prompt, prompt_lookup_num_tokens=3)
        assert torch.equal(found, tokens)
        same_contents(cache, expected)


def test_copies_saved_caches_and_repeated_rows_stay_on_their_devices(tmp_path):
    ids, mask = padded_prompt()
    more = random_tokens(4, 3, seed=5)
    longer = torch.cat([mask.repeat_interleave(2, 0), torch.ones(4, 3, dtype=torch.long)], dim=1)
    logits = []
    for several in (False, True):
        model = tiny_model("llama", num_hidden_layers=LAYERS)
        with SeveralDevices():
            model = spread() if several else model
            device = "ipu:0" if several else "cpu"
            cache = PolicyCache(model, "adakv", budget=10, window=4)
            with torch.no_grad():
                model(ids.to(device), attention_mask=mask.to(device), past_key_values=cache)
                copied = copy.deepcopy(cache)
                cache.save(tmp_path / str(several))
                loaded = PolicyCache.load(tmp_path / str(several), model)
                for each in (cache, copied, loaded):
                    each.batch_repeat_interleave(2)
                    out = model(more.to(device), attention_mask=longer.to(device), past_key_values=each)
                    logits.append(out.logits.cpu())
                    wanted = alternating(LAYERS) if several else ["cpu"] * LAYERS
                    assert [str(layer.table.keys.device) for layer in each.policy_layers] == wanted
    assert logits[0].std() > 0.1
    assert all((other - logits[0]).abs().max() < 1e-5 for other in logits[1:])


def test_a_stock_cache_taken_over_stays_on_its_devices():
    from transformers import DynamicCache

    ids, mask = padded_prompt()
    with SeveralDevices():
        model = spread()
        full = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids.to("ipu:0"), attention_mask=mask.to("ipu:0"), past_key_values=full)
        cache = PolicyCache.from_cache(model, "knorm", full, attention_mask=mask.to("ipu:0"), budget=8)
        assert [str(layer.table.keys.device) for layer in cache.policy_layers] == alternating(LAYERS)
        assert all((cache.kept_positions(layer) >= 0).sum(-1).eq(8).all() for layer in range(LAYERS))


@pytest.mark.parametrize("name", ["snapkv", "sepllm", "tidaldecode", "streaming_llm, re-indexed"])
def test_what_a_forward_moves_does_not_grow_with_the_layers(name):
    """Beside what a stock cache moves (accelerate gives each layer its own mask and position ids)."""
    from transformers import DynamicCache

    ids, mask = padded_prompt()
    extra = []
    for layers in (6, 10):
        with SeveralDevices(), torch.no_grad():
            counts = []
            model = spread(layers)
            model.set_attn_implementation("eager")  # it too gets a mask
            for cache in (DynamicCache(config=model.config), PolicyCache(model, POLICIES[name])):
                given = {"attention_mask": mask.to("ipu:0"), "past_key_values": cache}
                model(ids.to("ipu:0"), **given)
                given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
                with counted_crossings() as crossings:
                    model(ids[:, :1].to("ipu:0"), **given)
                counts.append(sum(count for (source, to), count in crossings.items() if to != "cpu" != source))
            extra.append(counts[1] - counts[0])
    assert extra[0] == extra[1], extra
    assert counts[0] > 0


def test_cpu_and_meta():
    """Keys on `meta` (a model without weights) are kept there, with no numbers asked for."""
    for policy, budget in (("full", None), ("streaming_llm", 8)):
        config = tiny_model("llama", num_hidden_layers=4).config
        parameters = {} if budget is None else {"budget": budget}
        cache = PolicyCache.from_config(config, policy, **parameters)
        for rows in (12, 1, 1, 3):
            for layer, device in enumerate(("cpu", "meta", "cpu", "meta")):
                states = torch.randn(1, 2, rows, 8, device=device)
                keys, values = cache.update(states, states, layer)
                assert keys.device.type == values.device.type == device
        for layer, device in zip(cache.policy_layers, ("cpu", "meta", "cpu", "meta"), strict=True):
            assert {
                tensor.device.type for tensor in layer.table.tensors() if tensor is not None and tensor.numel()
            } == {device}
            assert layer.table.held.tolist() == [[budget or 17] * 2]
        assert 0 < cache.nbytes < 2 * 2 * 2 * 24 * 8 * 4  # of the two layers that hold numbers


def test_offload_is_refused():
    with SeveralDevices():
        with pytest.raises(UnsupportedModelError, match=r"several devices, this one is on \['ipu:0', 'ipu:1'\]"):
            PolicyCache(spread(), "full", offload=Offload(host="1MB"))


# -- the devices themselves --------------------------------------------------------------------------------------------


def test_devices_do_not_mix():
    with SeveralDevices():
        near, far, plain = torch.ones(2, device="ipu:0"), torch.ones(2).to("ipu:1"), torch.ones(2)
        assert str(near.device) == "ipu:0" and isinstance(far, DeviceTensor)
        for other in (far, plain):
            with pytest.raises(MixedDevicesError):
                near + other
            with pytest.raises(MixedDevicesError):
                near[other.long()]
            with pytest.raises(MixedDevicesError):
                torch.cat([near, other])
        assert (near * torch.tensor(3.0)).tolist() == [3.0, 3.0]
        view = near[:1]
        view.fill_(5)
        near[1:] = far[1:].to("ipu:0") * 7
        assert near.cpu().tolist() == [5.0, 7.0]
        near.copy_(far)
        assert near.tolist() == [1.0, 1.0]


# -- sabotage: each forgotten move must be noticed -----------------------------------------------------------------------


def tokens_stay(patch):
    patch.setattr(Tokens, "to", lambda self, device: self)


def token_ids_stay(patch):
    original = kvpress.token_ids.TokenIds.read

    def read(self, batch, rows, device):
        return original(self, batch, rows, next(iter(kvpress.token_ids._current.get()[1])))

    patch.setattr(kvpress.token_ids.TokenIds, "read", read)


def selection_stays(patch):
    from kvpress.policies.tidaldecode import TidalSelector

    original = TidalSelector.select

    def select(self, view):
        chosen = original(self, view)
        return next(iter(self.shared["tidaldecode"].values())) if chosen is not None else None

    patch.setattr(TidalSelector, "select", select)


def rotation_stays(patch):
    original = kvpress.rope.Rotation.undo

    def undo(self, rotated, position_ids):
        for device, seen in list(self._seen.items()):
            if device != rotated.device and seen[0].equal(position_ids.to(device)):
                self._seen[rotated.device] = (position_ids, *seen[1:])
        return original(self, rotated, position_ids)

    patch.setattr(kvpress.rope.Rotation, "undo", undo)


NOTICED = [
    (tokens_stay, "streaming_llm"),
    (tokens_stay, "quest"),
    (token_ids_stay, "sepllm"),
    (selection_stays, "tidaldecode"),
    (rotation_stays, "streaming_llm, re-indexed"),
]


@pytest.mark.parametrize(("break_it", "name"), NOTICED)
def test_a_forgotten_move_is_noticed(break_it, name, monkeypatch):
    break_it(monkeypatch)
    with pytest.raises(MixedDevicesError, match=r"got tensors on \['ipu:0', 'ipu:1'\]"):
        equals_one_device(name)
