"""Re-indexed positions: attention over ranks 0 … n-1, for every kind of rotation, against passes in which nothing is ever undone."""

import pytest
import torch
import transformers
from test_tokenselect_sets import SMALL, cut, voter

from kvpress import PolicyCache
from kvpress.kernels.native import missing
from kvpress.policies import SepLLM, StreamingLLM, TokenSelect
from kvpress.rope import Rotation
from kvpress.testing.families import VOCABULARY, model_from, tiny_model

ROPE = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}  # fmt: skip


def rotated(kind):
    changes = {"rope_parameters": ROPE[kind]}
    if kind == "dynamic":
        changes["max_position_embeddings"] = (
            12  # shorter than the 15 tokens that are attended to: frequencies follow the length
        )
    return tiny_model("llama", dtype=torch.float64, **changes)


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip


def interleaved():
    """Channel 2i is turned with channel 2i + 1: no rotation that the kernels know."""
    return model_from(transformers.GlmConfig(**SIZES, head_dim=8), dtype=torch.float64)


MODELS = {
    "interleaved": interleaved,
    **{kind: lambda kind=kind: rotated(kind) for kind in ROPE},
    "partial": lambda: tiny_model("gpt_neox", dtype=torch.float64),
    "gemma3": lambda: tiny_model("gemma3", dtype=torch.float64),
    "gemma2": lambda: tiny_model("gemma2", dtype=torch.float64),
    "gpt_oss": lambda: tiny_model("gpt_oss", dtype=torch.float64),
    "qwen3": lambda: tiny_model("qwen3", dtype=torch.float64),
    "phi3": lambda: tiny_model("phi3", dtype=torch.float64),
}


@pytest.mark.parametrize("kind", MODELS)
def test_tokenselect_equals_a_pass_without_rotation_to_undo(compare, kind):
    policy = TokenSelect(**SMALL, tail=2, threshold=0.3)
    _, result = compare(
        MODELS[kind](),
        policy,
        voter(policy),
        blocks=cut(policy),
        reindex=True,
        sizes=(30, *[1] * 6),
        batch=2,
        pads=(0, 6),
    )
    assert result.error < (1e-5 if kind == "gemma2" else 1e-8)  # its norms compute in fp32
    assert result.narrowed > 8


def everything():
    return lambda question: None


@pytest.mark.parametrize("kind", MODELS)
def test_streaming_llm_equals_the_paper(compare, kind):
    """Sinks and the last tokens at ranks 0 … n-1, decoding and in chunks; a chunk sees what was kept before it, and itself."""
    fed, result = compare(
        MODELS[kind](), StreamingLLM(budget=14, sinks=3, positions="reindex"), everything, reindex=True, held=True,
        sizes=(12, 9, *[1] * 5, 6, *[1] * 4), batch=2, pads=(0, 4),
    )  # fmt: skip
    assert result.error < (1e-5 if kind == "gemma2" else 1e-8)  # its norms compute in fp32
    assert fed.cache.report().evictions > 0
    assert fed.sets(-1, fed.cache.policy_layers[0].layer_idx, 0)[0][:3] == [0, 1, 2]


def test_sepllm(compare, llama):
    policy = SepLLM(initial=2, separators=4, window=6, capacity=16, token_ids=tuple(range(3, 60)), positions="reindex")
    fed, result = compare(
        llama, policy, everything, reindex=True, held=True, sizes=(24, *[1] * 14), batch=2, pads=(0, 4)
    )
    assert result.error < 1e-8
    assert fed.cache.report().evictions > 8


def test_kept_positions_are_caught_where_ranks_are_meant(compare, llama):
    """The same sets at original positions give other logits."""
    _, result = compare(
        llama,
        StreamingLLM(budget=14, sinks=3, positions="keep"),
        everything,
        reindex=True,
        held=True,
        sizes=(12, 9, *[1] * 5),
    )
    assert result.error > 1e-3


def test_ranks_do_not_depend_on_where_a_text_begins(feed, llama):
    """With original positions far beyond, re-indexed attention gives the same: what extrapolation rests on."""
    policy = TokenSelect(**SMALL, tail=2, threshold=0.3)
    ids = torch.arange(3, 43)[None]
    near = feed(llama, PolicyCache(llama, policy), ids, (30, *[1] * 10))
    far = PolicyCache(llama, policy)
    logits, kept = [], 100_000
    far_positions = torch.arange(kept, kept + 40)[None]
    far.policy_layers[0].clock.check_positions = lambda *arguments: (
        None
    )  # it refuses positions that do not continue the cache
    for first, last in near.cuts:
        with torch.no_grad():
            logits.append(
                llama(ids[:, first:last], position_ids=far_positions[:, first:last], past_key_values=far).logits[0]
            )
    assert float((torch.cat(logits) - near.logits[0]).abs().max()) < 1e-6


def test_position_ids_changed_in_place_are_noticed(feed, llama):
    policy = TokenSelect(**SMALL, tail=2, threshold=0.3)
    ids = torch.arange(3, 43)[None]
    expected = feed(llama, PolicyCache(llama, policy), ids, (30, *[1] * 10)).logits[0][30:]
    cache, logits, positions = PolicyCache(llama, policy), [], torch.tensor([[29]])
    with torch.no_grad():
        llama(ids[:, :30], past_key_values=cache)
        for step in range(30, 40):
            positions += 1
            logits.append(llama(ids[:, step : step + 1], position_ids=positions, past_key_values=cache).logits[0])
    assert float((torch.cat(logits) - expected).abs().max()) < 1e-9


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_way_back_of_coming_positions_is_that_of_each(kind, dtype):
    rotation = Rotation(rotated(kind))
    rows = torch.randn(2, 3, 1, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for position in (0, 5, 63, 64, 130, 131, 2):
        ids = torch.tensor([[position]])
        rotation.begin()
        undone = rotation.undo(rows, ids)
        alone = rotation._way_back(rows.to(torch.promote_types(dtype, torch.float32)), ids).rotate(rows)
        assert torch.equal(undone, alone)
        room = rows.repeat(1, 1, 4, 1)
        assert rotation.undo_in_place(room, 2, rows, ids) == (missing is None and dtype != torch.float64)
        assert torch.equal(room[:, :, 2:3], undone if missing is None and dtype != torch.float64 else rows)
        found.append(undone)
    assert not torch.equal(found[1], found[2])
    assert bool(rotation._ahead) == (kind != "dynamic"), (
        "frequencies that follow the length are asked for at every token"
    )
    rotation.begin()
    apart = torch.tensor([[3], [9]])
    both = rotation.undo(rows, apart)
    for row in (0, 1):
        rotation.begin()
        assert torch.equal(both[row : row + 1], rotation.undo(rows[row : row + 1], apart[row : row + 1]))
