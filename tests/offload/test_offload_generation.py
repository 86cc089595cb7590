"""Generation with offload equals generation without, bit for bit, in every way of generating."""

import itertools

import pytest
import torch

from kvpress import PolicyCache
from kvpress.offload import Offload, gathered
from kvpress.offload.gathered import GatheredSlots
from kvpress.offload.hot_slots import HotSlots
from kvpress.offload.stowage import Stowage
from kvpress.offload.working import StoredBlock
from kvpress.policies import H2O, AdaKV, Full, KNorm, Quest, SnapKV, StreamingLLM, TidalDecode, TokenSelect
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.generation import WAYS

LAYERS = 4  # TidalDecode: two choose, two follow
NARROW = {
    "full": Full(),
    "tokenselect keep": TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, positions="keep", threshold=0.5),
    "tokenselect reindex": TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=0.5),
    "tokenselect int8 keep": TokenSelect(
        top_k=5, sinks=2, local=6, chunk=6, tail=2, positions="keep", threshold=0.5, index="int8"
    ),
    "tokenselect int4 reindex": TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=0.5, index="int4"),
    "tokenselect int8 reindex": TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=0.5, index="int8"),
    "quest": Quest(top_k=8, page_size=4, skip_layers=1),
    "tidaldecode": TidalDecode(top_k=8, dense_layers=0),
}
EVICTING = {
    "streaming_llm": StreamingLLM(budget=26, sinks=2),
    "streaming_llm interval": StreamingLLM(budget=24, sinks=2, interval=3),
    "snapkv": SnapKV(budget=26, window=4),
    "h2o": H2O(budget=26),
    "adakv": AdaKV(budget=26, window=4),
    "knorm and tokenselect": [
        KNorm(budget=26),
        TokenSelect(top_k=4, sinks=2, local=6, chunk=6, tail=2, positions="keep"),
    ],
}
WITHOUT = {}  # outcomes without offload
FOLDERS = itertools.count()


def without(name, way, policy, family="llama", kv_dtype=None):
    key = name, way, family, kv_dtype
    if key not in WITHOUT:
        WITHOUT[key] = WAYS[way](model_of(family), lambda model: PolicyCache(model, policy, kv_dtype=kv_dtype))
    return WITHOUT[key]


def model_of(family):
    return tiny_model(family, num_hidden_layers=LAYERS) if family == "llama" else tiny_model(family)


@pytest.fixture
def offloaded(folder):
    """`offloaded(way, policy, host=…)`: what the way gives with offload, and the counters of each tier."""
    made = []

    def run(way, policy, family="llama", kv_dtype=None, **options):
        def make(model):
            offload = Offload(disk=folder, block=4, **options)
            made.append(PolicyCache(model, policy, kv_dtype=kv_dtype, offload=offload))
            return made[-1]

        outcome = WAYS[way](model_of(family), make)
        return outcome, made[0].tiers.statistics()

    yield run
    for cache in made:
        cache.close()
    made.clear()
    assert not list(folder.iterdir()), "files are left"


def differences(outcome, expected):
    assert len(outcome.logits) == len(expected.logits) > 0
    pairs = zip(outcome.logits, expected.logits, strict=True)
    return sum(not torch.equal(a, b) for a, b in pairs)


def cases():
    for name in NARROW:
        for way in WAYS if name == "full" else ("padded_batch", "beams", "prompt_lookup", "turns", "branches"):
            yield name, way


@pytest.mark.parametrize(("name", "way"), list(cases()))
def test_everything_on_disk_gives_the_same_logits(offloaded, name, way):
    outcome, tiers = offloaded(way, NARROW[name])
    assert differences(outcome, without(name, way, NARROW[name])) == 0
    assert tiers["disk"].bytes_out > 0 and tiers["disk"].peak_bytes > 0


@pytest.mark.parametrize(("name", "way", "host", "prefetch"), [
    ("full", "padded_batch", 36_000, 0), ("full", "beams", 62_000, 1), ("full", "turns", 34_000, 2), ("full", "branches", 40_000, 1),
    ("tokenselect keep", "turns", 41_000, 1), ("tokenselect reindex", "padded_batch", 56_000, 1),
    ("tokenselect reindex", "beams", 84_000, 0), ("quest", "turns", 46_000, 2), ("quest", "branches", 44_000, 0),
    ("tokenselect int8 keep", "turns", 52_000, 1), ("tokenselect int8 reindex", "beams", 95_000, 1),
    ("tidaldecode", "turns", 36_000, 0), ("tidaldecode", "padded_batch", 36_000, 1),
])  # fmt: skip
def test_a_near_tier_that_is_too_small_gives_the_same_logits(offloaded, name, way, host, prefetch):
    outcome, tiers = offloaded(way, NARROW[name], host=host, prefetch=prefetch)
    assert differences(outcome, without(name, way, NARROW[name])) == 0
    assert tiers["disk"].bytes_in > 0 and tiers["disk"].bytes_out > 0
    assert 0 < tiers["host"].peak_bytes <= host


WAYS_OF_EVICTING = ("padded_batch", "chunks_of_3", "beams", "turns", "branches", "turns")


@pytest.mark.parametrize(("name", "way"), list(zip(EVICTING, WAYS_OF_EVICTING, strict=True)))
def test_an_evicting_policy_goes_through_the_tiers_until_its_table_is_steady(offloaded, name, way):
    outcome, tiers = offloaded(way, EVICTING[name])
    assert differences(outcome, without(name, way, EVICTING[name])) == 0
    assert tiers["disk"].bytes_out > 0
    assert outcome.cache.report().evictions > 0


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt_neox", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_other_families_and_mixed_layers(offloaded, family):
    outcome, tiers = offloaded("padded_batch", Full(), family)
    assert differences(outcome, without("full", "padded_batch", Full(), family)) == 0
    assert tiers["disk"].bytes_out > 0


PACKED = [(name, kind) for name in NARROW for kind in ("int8", "bfloat16")] + [
    ("full", "float16"),
    ("quest", "float16"),
]


@pytest.mark.parametrize(("name", "kind"), PACKED)
def test_packed_rows_are_moved_as_they_are(offloaded, name, kind):
    for way in ("turns", "beams") if kind == "int8" else ("padded_batch",):
        outcome, tiers = offloaded(way, NARROW[name], kv_dtype=kind)
        assert differences(outcome, without(name, way, NARROW[name], kv_dtype=kind)) == 0
        assert differences(outcome, without(name, way, NARROW[name])) > 0, "the numbers were not rounded"
        assert tiers["disk"].bytes_out > 0
        plain = sum(layer.full_nbytes for layer in outcome.cache.policy_layers)
        assert tiers["disk"].peak_bytes < plain or name != "full"


@pytest.mark.parametrize(("name", "kind", "host"), [
    ("full", "int8", 17_000), ("tokenselect keep", "bfloat16", 22_000), ("tokenselect int8 reindex", "int8", 28_000),
    ("quest", "int8", 28_000), ("tidaldecode", "float16", 20_000),
])  # fmt: skip
def test_packed_rows_where_the_near_tier_is_too_small(offloaded, name, kind, host):
    outcome, tiers = offloaded("turns", NARROW[name], kv_dtype=kind, host=host)
    assert differences(outcome, without(name, "turns", NARROW[name], kv_dtype=kind)) == 0
    assert tiers["disk"].bytes_in > 0 and 0 < tiers["host"].peak_bytes <= host


@pytest.mark.parametrize("name", EVICTING)
def test_packed_rows_of_an_evicting_policy(offloaded, name):
    outcome, _ = offloaded("turns", EVICTING[name], kv_dtype="int8")
    assert differences(outcome, without(name, "turns", EVICTING[name], kv_dtype="int8")) == 0
    assert outcome.cache.report().evictions > 0 and outcome.cache.kv_dtype == "int8"


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_packed_rows_of_other_families(offloaded, family):
    outcome, tiers = offloaded("padded_batch", Full(), family, kv_dtype="int8")
    assert differences(outcome, without("full", "padded_batch", Full(), family, "int8")) == 0
    assert tiers["disk"].bytes_out > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_keep_their_bits(folder, dtype):
    model, ids = tiny_model("llama", dtype=dtype), random_tokens(2, 30)
    logits = []
    for offload in (None, Offload(disk=folder, block=4)):
        cache = PolicyCache(model, "full", offload=offload)
        with torch.no_grad():
            logits.append([model(piece, past_key_values=cache).logits for piece in ids.split([20, 1, 8, 1], dim=1)])
        if offload is not None:
            assert cache.report().tiers[0].bytes_out > 0
            assert all(layer.keys.dtype == dtype for layer in cache.policy_layers)
        cache.close()
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def test_crop_takes_back_into_a_block(folder):
    model, ids = tiny_model("llama"), random_tokens(1, 40)
    caches = [PolicyCache(model, "full", offload=offload) for offload in (None, Offload(disk=folder, block=8))]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :37], past_key_values=cache)
        assert caches[1].policy_layers[0].table.base == 32
        for removed in (3, 4, 2, 17, 1):  # inside the tail, down to a block's end, into blocks
            for cache in caches:
                cache.crop(-removed)
            for layer, plain in zip(caches[1].policy_layers, caches[0].policy_layers, strict=True):
                assert torch.equal(layer.keys, plain.keys) and torch.equal(layer.values, plain.values)
        assert caches[1].policy_layers[0].table.base == 8
        after = [model(ids[:, 10:30], past_key_values=cache).logits for cache in caches]
        for cache in caches:
            cache.crop(-cache.seen_tokens)
            assert cache.seen_tokens == 0
        again = [model(ids, past_key_values=cache).logits for cache in caches]
    assert torch.equal(*after) and torch.equal(*again)
    assert caches[1].report().tiers[0].blocks == 2 * 5


def rows_with_and_without(folder):
    """Logits of a token after batch rows were selected, repeated and reordered; and the bytes written before and after."""
    model, ids = tiny_model("llama"), random_tokens(3, 32)
    caches = [PolicyCache(model, "full", offload=offload) for offload in (None, Offload(disk=folder, block=4))]
    with torch.no_grad():
        for cache in caches:
            for piece in ids.split([30, 1, 1], dim=1):
                model(piece, past_key_values=cache)
            cache.batch_select_indices(torch.tensor([2, 0, 1]))
            model(random_tokens(3, 1, seed=4), past_key_values=cache)
            cache.batch_select_indices(torch.tensor([2, 0]))
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([3, 1, 1, 0]))
        written = caches[1].report().tiers[0].bytes_in
        outputs = [model(random_tokens(4, 1, seed=4), past_key_values=cache).logits for cache in caches]
    written = (written, caches[1].report().tiers[0].bytes_in)
    caches[1].close()
    return outputs, written


def test_batch_rows_are_selected_and_repeated_in_the_blocks(folder):
    outputs, written = rows_with_and_without(folder)
    assert torch.equal(*outputs)
    assert written[0] == written[1] > 0, "a reordered block was written anew"


def test_a_saved_cache_holds_what_lay_in_the_tiers(folder):
    model, ids = tiny_model("llama"), random_tokens(1, 30)
    cache = PolicyCache(model, "full", offload=Offload(disk=folder / "tiers", block=4))
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        cache.save(folder / "saved")
        loaded = PolicyCache.load(folder / "saved", model)
        assert cache.report().tiers[0].blocks > 0 and loaded.tiers is None
        outputs = [model(ids[:, -1:], past_key_values=each).logits for each in (cache, loaded)]
    assert torch.equal(*outputs)
    cache.close()


def logits_after_other_tokens(folder, policy, other):
    """Of decoded tokens, some of which were taken back for others: with offload, and without."""
    model, ids = model_of("llama"), random_tokens(1, 60)
    caches = [PolicyCache(model, policy, offload=offload) for offload in (None, Offload(disk=folder, block=16))]
    found = []
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :36], past_key_values=cache)
            for token in ids[0, 36:43]:
                model(token.view(1, 1), past_key_values=cache)
            cache.crop(-other)  # back to token 43 - other, in the tail of blocks of 16 slots
            logits = [model(token.view(1, 1), past_key_values=cache).logits for token in ids[0, 43:55]]
            found.append(torch.cat(logits, dim=1))
    caches[1].close()
    return found


@pytest.mark.parametrize(
    "name", ["tokenselect int8 keep", "tokenselect int8 reindex", "tokenselect int4 reindex", "quest"]
)
def test_a_token_in_the_place_of_one_taken_back_is_read(folder, name, monkeypatch):
    expected, found = logits_after_other_tokens(folder, NARROW[name], 5)
    assert torch.equal(expected, found)
    monkeypatch.setattr(HotSlots, "take_tail", lambda self, table: None)  # where the last slots are copied
    expected, found = logits_after_other_tokens(folder, NARROW[name], 5)
    assert torch.equal(expected, found)
    monkeypatch.setattr(HotSlots, "forget_from", lambda self, slot, base: None)
    expected, found = logits_after_other_tokens(folder, NARROW[name], 5)
    assert not torch.equal(expected, found), "copies of tokens taken back that stay are not noticed"


def test_blocks_filled_since_a_layer_was_read_ahead_are_read(folder, monkeypatch):
    """A selection that has an index fetches nothing for decoded tokens: what was read ahead is old when the next turn comes."""
    monkeypatch.setattr(gathered, "growth", lambda slots: 32)  # working memory has room for them
    used = []
    original = GatheredSlots._read_ahead

    def counted(self, table, tokens):
        ahead = self._ahead is not None
        found = original(self, table, tokens)
        used.append((ahead, found is not None))
        return found

    monkeypatch.setattr(GatheredSlots, "_read_ahead", counted)
    expected, found = several_turns(folder, NARROW["tokenselect int8 keep"], decoded=6)
    assert torch.equal(expected, found) and (True, False) in used
    used.clear()
    expected, found = several_turns(folder, NARROW["tokenselect int8 keep"], decoded=0)
    assert torch.equal(expected, found) and (True, True) in used, "nothing was read ahead"


def several_turns(folder, policy, decoded):
    """Logits of turns of 5 tokens, after each of which `decoded` tokens come one by one: with offload, and without."""
    model, ids, found = model_of("llama"), random_tokens(1, 90), []
    for offload in (None, Offload(disk=folder, block=4)):
        cache, logits, first = PolicyCache(model, policy, offload=offload), [], 0
        with torch.no_grad():
            for turn in range(4):
                for length in (5 if turn else 36, *[1] * decoded):
                    logits.append(model(ids[:, first : first + length], past_key_values=cache).logits)
                    first += length
        found.append(torch.cat(logits, dim=1))
        cache.close()
    return found


# -- variants that must be noticed -------------------------------------------------------------------------------------


def ignores_rows(self, rows):
    return self


def brings_nothing(self, index, table):
    place, missing = HotSlots.found(self, index, table)
    return place, missing[:0]


def keeps_what_was_read_ahead(self):
    pass


@pytest.mark.parametrize(("owner", "method", "wrong"), [
    (StoredBlock, "selected", ignores_rows),
    (Stowage, "_invalidate", keeps_what_was_read_ahead),
])  # fmt: skip
def test_wrong_rows_are_noticed(folder, monkeypatch, owner, method, wrong):
    monkeypatch.setattr(owner, method, wrong)
    try:
        outputs, _ = rows_with_and_without(folder)
    except RuntimeError:  # shapes that do not fit
        return
    assert not torch.equal(*outputs)


def test_a_selection_that_is_not_brought_is_noticed(offloaded, monkeypatch):
    expected = without("tokenselect keep", "greedy", NARROW["tokenselect keep"])
    monkeypatch.setattr(HotSlots, "found", HotSlots.find, raising=False)
    monkeypatch.setattr(HotSlots, "find", brings_nothing)
    outcome, _ = offloaded("greedy", NARROW["tokenselect keep"])
    assert differences(outcome, expected) > 0
