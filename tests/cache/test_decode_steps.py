"""Decoded tokens that go through a layer by one call, against the same tokens the ordinary way: the same bits, and the same cache after."""

import copy
import inspect

import pytest
import torch

from kvpress import PolicyCache
from kvpress.decode_step import DecodeStep
from kvpress.errors import CacheStateError
from kvpress.kernels.decode_step import PreparedStep
from kvpress.kernels.native import missing
from kvpress.kernels.rotation.prepared import PreparedRotation
from kvpress.layer import PolicyLayer
from kvpress.policies import (
    H2O,
    TOVA,
    AdaKV,
    Full,
    Keyformer,
    KNorm,
    PyramidKV,
    Quest,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    TokenSelect,
)
from kvpress.policies.token_rule import TokenRule
from kvpress.row_format import KV_DTYPES
from kvpress.testing.families import random_tokens, tiny_model

pytestmark = pytest.mark.skipif(missing is not None, reason="no native kernels")

PARTS = {"top_k": 5, "sinks": 2, "local": 6, "chunk": 6, "tail": 2}
POLICIES = {
    "full": Full(),
    "tokenselect": TokenSelect(**PARTS, threshold=0.7),
    "tokenselect, anew": TokenSelect(**PARTS, threshold=2),
    "tokenselect, mod, positions kept": TokenSelect(**PARTS, threshold=0.7, group="mod", positions="keep"),
    "tokenselect, int8": TokenSelect(**PARTS, threshold=0.7, index="int8"),
    "quest": Quest(top_k=16, page_size=4, skip_layers=1),
    "tidaldecode": TidalDecode(top_k=9, dense_layers=1, reselect_layer=2),
}
EVICTING = {
    "snapkv": SnapKV(budget=16, window=3),
    "snapkv, sum": SnapKV(budget=16, window=4, group_reduce="sum"),
    "snapkv, budgets by head": SnapKV(budget=((16, 12), 14, (9, 21), (16, 12)), window=4),
    "h2o": H2O(budget=16),
    "adakv": AdaKV(budget=16, window=4),
    "pyramidkv": PyramidKV(budget=16, window=4),
    "streaming_llm": StreamingLLM(budget=16, sinks=2),
    "keyformer, plain": Keyformer(budget=16, noise=None, tau_end=1.0),
}
POLICIES |= EVICTING
PROMPT, DECODED = 40, 30


@pytest.fixture
def model():
    return models("llama")


def models(family: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return tiny_model(family, dtype=dtype, num_hidden_layers=4)


@pytest.fixture
def steps(monkeypatch):
    """How many tokens went by a step, and how many were on their way and left it."""
    count = {"taken": 0, "left": 0}
    took, leave = PolicyLayer.took_step, DecodeStep.leave

    def counted(name, original):
        def call(self, *arguments):
            count[name] += 1
            return original(self, *arguments)

        return call

    monkeypatch.setattr(PolicyLayer, "took_step", counted("taken", took))
    monkeypatch.setattr(DecodeStep, "leave", counted("left", leave))
    return count


def ordinary(context):
    context.setattr(PolicyLayer, "prepare_step", lambda *given: None)


def decoded(model, cache, ids, **options):
    """Logits of every token of `ids`, fed one by one, and what each layer attended to."""
    logits, read = [], []
    for column in range(ids.shape[1]):
        logits.append(model(ids[:, column : column + 1], past_key_values=cache, **options).logits)
        if cache.policies.selection is not None:
            read.append([cache.selected_positions(layer.layer_idx).tolist() for layer in cache.policy_layers])
    return torch.cat(logits, dim=1), read


def facts(cache):
    """What is left in a cache: tensors in use, and numbers."""
    found = []
    for layer in cache.policy_layers:
        table = layer.table
        found += [*(each.clone() for each in table.dense()), table.positions.clone(), torch.tensor(table.held)]
        found += [column.clone() for column in table.policy_columns.values()]
        found += [] if table.spare is None else [table.spare.clone()]
        keeper = layer.keeper
        found.append(torch.tensor([layer.seen, *layer.seen_rows, keeper.decoded, keeper.evictions, table.count]))
    report = cache.report().to_dict()
    return found, report


def both(model, policy, ids, kv_dtype=None, **options):
    """Logits and what was read, by steps and the ordinary way, and both caches."""
    with torch.no_grad():
        cache = PolicyCache(model, policy, kv_dtype=kv_dtype)
        model(ids[:, :PROMPT], past_key_values=cache)
        other = copy.deepcopy(cache)
        by_steps = decoded(model, cache, ids[:, PROMPT:], **options)
        with pytest.MonkeyPatch.context() as context:
            ordinary(context)
            apart = decoded(model, other, ids[:, PROMPT:], **options)
    return by_steps, apart, cache, other


def run_both_ways(model, policy, run):
    """What `run(cache)` gives by steps and the ordinary way, and both caches."""
    results, caches = [], [PolicyCache(model, policy) for _ in range(2)]
    with torch.no_grad():
        results.append(run(caches[0]))
        with pytest.MonkeyPatch.context() as context:
            ordinary(context)
            results.append(run(caches[1]))
    return *results, *caches


def same(cache, other):
    (tensors, report), (others, other_report) = facts(cache), facts(other)
    assert all(torch.equal(one, two) for one, two in zip(tensors, others, strict=True))
    if cache.policies.eviction.budget is not None:
        assert all(layer.keeper.evictions > 20 for layer in cache.policy_layers)
    assert report == other_report


def repeated(batch: int) -> torch.Tensor:
    """Tokens of which many follow themselves: equal tokens ask alike."""
    return random_tokens(batch, (PROMPT + DECODED) // 2, seed=3).repeat_interleave(2, dim=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_steps_are_the_ordinary_way_bit_for_bit(steps, name, dtype, batch):
    model = models("llama", dtype)
    (logits, read), (apart, read_apart), cache, other = both(model, POLICIES[name], repeated(batch))
    assert torch.equal(logits, apart)
    assert read == read_apart
    same(cache, other)
    full = (
        DECODED - 1 - cache.policy_layers[1].table.count // 64 - 2
    )  # the first token, and those at which buffers grew
    layers = {"tidaldecode": 1}.get(name, 3)  # the first layer has none, nor have those of TidalDecode that choose
    assert steps["taken"] > layers * full // 2
    if read:
        assert len(read[-1][-1][0][0] if cache.policies.selection.name != "tokenselect" else read[-1][-1][0]) < PROMPT
    if name == "tokenselect":
        assert cache.report().selections_reused > 10 < cache.report().selections


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    "name", ["full", "tokenselect", "tokenselect, mod, positions kept", "quest", "snapkv", "adakv", "streaming_llm"]
)
def test_steps_over_packed_rows(steps, model, name, kv_dtype):
    (logits, read), (apart, read_apart), cache, other = both(model, POLICIES[name], repeated(2), kv_dtype)
    assert torch.equal(logits, apart) and read == read_apart
    same(cache, other)
    assert steps["taken"] > 2 * DECODED


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "mistral", "gpt_neox", "gemma3", "gpt_oss", "gemma2", "qwen2_moe", "phi3"]
)
@pytest.mark.parametrize("name", ["full", "tokenselect", "h2o"])
def test_steps_of_every_family(steps, family, name):
    """Norms, biases, sinks, soft caps, sliding layers between, partial rotation."""
    torch.manual_seed(0)
    model = tiny_model(family, dtype=torch.float32)
    (logits, read), (apart, read_apart), cache, other = both(model, POLICIES[name], repeated(1))
    assert torch.equal(logits, apart) and read == read_apart
    same(cache, other)
    assert steps["taken"] > DECODED // 2


def test_generate_takes_steps(steps, model):
    """With the mask that `generate` passes, of ones."""
    ids = random_tokens(1, PROMPT, seed=3)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    texts = [
        model.generate(ids, past_key_values=PolicyCache(model, Full()), attention_mask=torch.ones_like(ids), **options)
    ]
    assert steps["taken"] > 40
    with pytest.MonkeyPatch.context() as context:
        ordinary(context)
        texts.append(model.generate(ids, past_key_values=PolicyCache(model, Full()), **options))
    assert texts[0].tolist() == texts[1].tolist()


def masks(batch: int, padded: list[tuple[int, int]]) -> torch.Tensor:
    mask = torch.ones(batch, PROMPT + DECODED, dtype=torch.long)
    for row, column in padded:
        mask[row, column] = 0
    return mask


def masked(model, ids, mask):
    """A `run` that feeds a prompt and tokens with their padding mask: the logits of each token."""

    def run(cache):
        model(ids[:, :PROMPT], past_key_values=cache, attention_mask=mask[:, :PROMPT])
        ends = range(PROMPT + 1, PROMPT + DECODED + 1)
        return [
            model(ids[:, end - 1 : end], past_key_values=cache, attention_mask=mask[:, :end]).logits for end in ends
        ]

    return run


@pytest.mark.parametrize("name", ["full", "tokenselect", "quest", "snapkv", "snapkv, budgets by head"])
def test_a_decoded_padding_token_leaves(steps, model, name):
    """A row ends, and gets padding from then on."""
    ids, mask = repeated(2), masks(2, [(1, column) for column in range(PROMPT + 10, PROMPT + DECODED)])
    logits, apart, *caches = run_both_ways(model, POLICIES[name], masked(model, ids, mask))
    assert steps["taken"] > 15 and steps["left"] > 0
    assert all(torch.equal(one[0], two[0]) for one, two in zip(logits, apart, strict=True))
    assert all(torch.equal(one[1], two[1]) for one, two in zip(logits[:10], apart[:10], strict=True))
    same(*caches)


@pytest.mark.parametrize("name", ["full", *EVICTING])
def test_prompts_of_unequal_length(steps, model, name):
    """Padded on the left: once no slot is empty, rows go on at positions of their own."""
    ids, mask = repeated(2), masks(2, [(0, column) for column in range(9)])
    logits, apart, *caches = run_both_ways(model, POLICIES[name], masked(model, ids, mask))
    assert all(torch.equal(one, two) for one, two in zip(logits, apart, strict=True))
    same(*caches)
    assert (steps["taken"] > 2 * DECODED) == (name != "full")


def verbs(model, ids, taken_back):
    """A `run`: several tokens, the last of them and two more `taken_back` if so; rows exchanged; a copy; another turn; a row less."""

    def run(cache):
        model(ids[:, :PROMPT], past_key_values=cache)
        logits = [decoded(model, cache, ids[:, PROMPT : PROMPT + 5])[0]]
        logits.append(model(ids[:, PROMPT + 5 : PROMPT + 9], past_key_values=cache).logits)
        at = PROMPT + 9
        if taken_back:
            cache.crop(-6)
            at -= 6
        logits.append(decoded(model, cache, ids[:, at : at + 5])[0])
        cache.reorder_cache(torch.tensor([1, 0]))
        logits.append(decoded(model, cache, ids.flip(0)[:, at + 5 : at + 9])[0])
        copied = copy.deepcopy(cache)
        logits.append(decoded(model, cache, ids[:, at + 9 : at + 13])[0])
        logits.append(decoded(model, copied, ids[:, at + 9 : at + 13])[0])
        cache.batch_select_indices(torch.tensor([1]))
        logits.append(decoded(model, cache, ids[1:, at + 13 : at + 17])[0])
        return logits

    return run


@pytest.mark.parametrize("name", ["full", "tokenselect", "tokenselect, int8", "quest", *EVICTING])
def test_verbs_between_steps(steps, model, name):
    run = verbs(
        model, repeated(2), taken_back=name not in EVICTING
    )  # what evicts cannot take back without being told before
    logits, apart, *caches = run_both_ways(model, POLICIES[name], run)
    assert steps["taken"] > 25
    assert all(torch.equal(one, two) for one, two in zip(logits, apart, strict=True))
    assert torch.equal(logits[4], logits[5]), "a copy goes on as its original"
    same(*caches)


def test_what_asks_otherwise_leaves(steps, model):
    """Another scaling, a query of another type, gradients, autocast: each token goes the ordinary way, and the next ones step again."""
    ids = repeated(1)
    cache = PolicyCache(model, Full())
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        decoded(model, cache, ids[:, PROMPT : PROMPT + 4])
    module, before = model.model.layers[2].self_attn, steps["left"]
    module.scaling *= 2
    with torch.no_grad():
        doubled = decoded(model, cache, ids[:, PROMPT + 4 : PROMPT + 6])[0]
    assert steps["left"] == before + 1, "and from then on by a step of its own"
    module.scaling /= 2
    with torch.no_grad():
        cache.crop(-2)
        assert not torch.equal(decoded(model, cache, ids[:, PROMPT + 4 : PROMPT + 6])[0], doubled)
        with torch.autocast("cpu", torch.bfloat16):
            decoded(model, cache, ids[:, PROMPT + 6 : PROMPT + 8])
        taken = steps["taken"]
        decoded(model, cache, ids[:, PROMPT + 8 : PROMPT + 10])
        assert steps["taken"] > taken
    taken = steps["taken"]
    decoded(model, cache, ids[:, PROMPT + 10 : PROMPT + 12])  # with gradients
    assert steps["taken"] == taken


def test_a_forward_that_breaks_off_in_a_step_is_noticed(steps, model, monkeypatch):
    ids = repeated(1)
    cache = PolicyCache(model, Full())
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        decoded(model, cache, ids[:, PROMPT : PROMPT + 3])
        with pytest.MonkeyPatch.context() as context:
            context.setattr(PreparedStep, "run", lambda *given: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                decoded(model, cache, ids[:, PROMPT + 3 : PROMPT + 4])
        with pytest.raises(CacheStateError, match="broke off"):
            decoded(model, cache, ids[:, PROMPT + 3 : PROMPT + 4])
        cache.reset()
        model(ids[:, :PROMPT], past_key_values=cache)
        assert cache.seen_tokens == PROMPT


def test_keys_that_reach_attention_as_others_leave(steps, model, monkeypatch):
    """A model that makes other tensors of what `update` returned: the step must not be taken for lost."""
    ids = repeated(1)
    cache = PolicyCache(model, Full())
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        other = copy.deepcopy(cache)
        decoded(model, cache, ids[:, PROMPT : PROMPT + 3])
        update = PolicyCache.update

        def cloned(self, *given, **options):
            keys, values = update(self, *given, **options)
            return keys.clone(), values.clone()

        with pytest.MonkeyPatch.context() as context:
            context.setattr(PolicyCache, "update", cloned)
            logits = decoded(model, cache, ids[:, PROMPT + 3 : PROMPT + 6])[0]
        assert steps["left"] == 3, "once a layer, then they have none"
        with pytest.MonkeyPatch.context() as context:
            ordinary(context)
            apart = decoded(model, other, ids[:, PROMPT : PROMPT + 6])[0][:, 3:]
    assert torch.equal(logits, apart)
    same(cache, other)


def test_tokens_that_may_be_taken_back_take_no_steps_where_they_evict(steps, model):
    ids = repeated(1)
    with torch.no_grad():
        cache, other = PolicyCache(model, POLICIES["h2o"]), PolicyCache(model, POLICIES["h2o"])
        for each in (cache, other):
            model(ids[:, :PROMPT], past_key_values=each)
        decoded(model, cache, ids[:, PROMPT : PROMPT + 4])
        taken = steps["taken"]
        assert taken
        cache.activate_past_recording()
        wrong = decoded(model, cache, ids[:, 3:4])[0]
        cache.crop(-1)
        logits = decoded(model, cache, ids[:, PROMPT + 4 : PROMPT + 10])[0]
        assert steps["taken"] == taken
        with pytest.MonkeyPatch.context() as context:
            ordinary(context)
            apart = decoded(model, other, ids[:, PROMPT : PROMPT + 10])[0]
    assert torch.equal(logits, apart[:, 4:]) and not torch.equal(wrong[:, 0], apart[:, 4])


class Youngest(StreamingLLM):
    """Evicts the youngest: its parent's rule does not speak for it."""

    def score(self, observation):
        return -observation.positions.float()


@pytest.mark.parametrize(
    "policy",
    [
        Youngest(budget=16, sinks=2),
        H2O(budget=16, normalize=True),
        H2O(budget=16, decay=0.9),
        TOVA(budget=16),
        KNorm(budget=16),
        Keyformer(budget=16),
        SnapKV(budget=16, window=4, interval=3),
        StreamingLLM(budget=16, sinks=2, positions="reindex"),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_policies_that_have_no_rule_take_no_steps(steps, model, policy):
    (logits, _), (apart, _), _, _ = both(model, policy, repeated(1))
    assert torch.equal(logits, apart)
    assert steps == {"taken": 0, "left": 0}


class TwoColumns(H2O):
    columns = ("attention", "other")


class NoWeights(H2O):
    token_rule = TokenRule("attention")
    weights_reduction = None


class Recent(StreamingLLM):
    recent_queries = 4


@pytest.mark.parametrize(
    ("kind", "words"), [(TwoColumns, "columns"), (NoWeights, "weights_reduction"), (Recent, "recent queries")]
)
def test_rules_that_cannot_be_followed_are_refused(model, kind, words):
    with pytest.raises(ValueError, match=words):
        PolicyCache(model, kind(budget=16))


def one_slot_too_early(*, slot, **given):
    return given | {"slot": slot - 1}


def another_rotation(*, back, **given):
    """By other angles."""
    return given | {"back": PreparedRotation(back.sine, back.cosine, inverse=True)}


def list_not_followed(*, index, vote, **given):
    return given | {"index": index.copy_(torch.arange(index.shape[-1])), "vote": None}


def another_position(*, positions, **given):
    return given | {"positions": positions - 2}


def broken_steps(policy, model, broken):
    """Logits with a `PreparedStep.run` whose arguments are `broken`, and the ordinary way."""
    run = PreparedStep.run

    def changed(self, *given):
        arguments = inspect.signature(run).bind(self, *given).arguments
        del arguments["self"]
        return run(self, **broken(**arguments))

    with pytest.MonkeyPatch.context() as context:
        context.setattr(PreparedStep, "run", changed)
        (logits, _), (apart, _), _, _ = both(model, POLICIES[policy], repeated(1))
    return logits, apart


@pytest.mark.parametrize("broken", [one_slot_too_early, another_rotation, list_not_followed])
def test_broken_steps_are_noticed(model, broken):
    assert not torch.equal(*broken_steps("tokenselect, anew", model, broken))


@pytest.mark.parametrize("policy", ["snapkv", "streaming_llm"])
def test_broken_steps_that_evict_are_noticed(model, policy):
    assert not torch.equal(*broken_steps(policy, model, another_position))


def test_a_fade_of_a_rule_is_noticed(model, monkeypatch):
    monkeypatch.setattr(SnapKV, "token_rule", TokenRule("votes"))
    (logits, _), (apart, _), _, _ = both(model, POLICIES["snapkv"], repeated(1))
    assert not torch.equal(logits, apart)
