"""What is refused, what is counted, and that no row sees what comes after it."""

import pytest
import torch

from kvpress import PolicyCache
from kvpress.errors import UnsupportedModelError
from kvpress.policies import Quest, SnapKV, StreamingLLM, TidalDecode, TokenSelect, make_policy
from kvpress.testing.families import random_tokens, tiny_model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenSelect(top_k=0), "top_k of tokenselect must be an integer >= 1, got 0"),
        (lambda: TokenSelect(sinks=-1), "sinks of tokenselect must be an integer >= 0, got -1"),
        (lambda: TokenSelect(local=511), "local of tokenselect must be at least chunk=512, got 511"),
        (lambda: TokenSelect(chunk=0), "chunk of tokenselect"),
        (lambda: TokenSelect(tail=True), "tail of tokenselect"),
        (lambda: TokenSelect(threshold=3), "threshold of tokenselect must be a cosine"),
        (lambda: TokenSelect(threshold=float("nan")), "threshold of tokenselect must be a cosine"),
        (lambda: TokenSelect(positions="clamp"), "positions of tokenselect must be one of"),
        (lambda: TokenSelect(group="div"), "group of tokenselect must be one of"),
        (lambda: Quest(page_size=0), "page_size of quest"),
        (lambda: Quest(top_k=15), "top_k of quest must be an integer >= 16, got 15"),
        (lambda: Quest(skip_layers=-1), "skip_layers of quest"),
        (lambda: TidalDecode(top_k=0), "top_k of tidaldecode"),
        (lambda: TidalDecode(dense_layers=-1), "dense_layers of tidaldecode"),
        (
            lambda: TidalDecode(dense_layers=2, reselect_layer=2),
            "reselect_layer of tidaldecode must be an integer >= 3, got 2",
        ),
        (lambda: make_policy("tokenselect", topk=3), "no parameter 'topk'"),
        (lambda: make_policy("quest", budget=3), "no parameter 'budget': it keeps every token, and attends to top_k"),
    ],
)
def test_parameters_that_break_a_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_choices_that_do_not_go_together():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="at most one selection policy"):
        PolicyCache(model, [Quest(), TokenSelect()])
    with pytest.raises(ValueError, match="quest selects by keys as the model rotates them"):
        PolicyCache(model, [StreamingLLM(budget=16, positions="reindex"), Quest()])
    PolicyCache(model, [StreamingLLM(budget=16, positions="reindex"), TokenSelect()])
    with pytest.raises(ValueError, match="needs the model's rotary module"):
        PolicyCache.from_config(model.config, TokenSelect())
    with pytest.raises(UnsupportedModelError, match="could not be undone"):
        PolicyCache(tiny_model("deepseek_v3"), TokenSelect())


def test_selected_positions_needs_a_selection(llama):
    with pytest.raises(ValueError, match="selected_positions needs a selection policy"):
        PolicyCache(llama, SnapKV(budget=16, window=4)).selected_positions(0)
    assert PolicyCache(llama, TokenSelect()).selected_positions(0).numel() == 0


def test_selection_state_is_counted(feed, llama):
    ids = torch.arange(3, 43)[None]
    plain = feed(llama, PolicyCache(llama, Quest(top_k=1024)), ids, (30, 1)).cache
    paged = feed(llama, PolicyCache(llama, Quest(top_k=16, page_size=16, skip_layers=0)), ids, (30, 1)).cache
    # two vectors a page of 16 in every layer and KV head, in the type of the keys
    assert paged.nbytes - plain.nbytes == 2 * 2 * 2 * 2 * 8 * 8


def prompts(length, changed):
    ids = torch.arange(3, 3 + length)[None]
    other = ids.clone()
    other[0, changed] = 96
    return ids, other


@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("chunk", [1, 8])
def test_no_row_sees_a_later_token(llama, positions, chunk):
    """The last token of a chunk changes. Rows of earlier chunks stay as they were, bit for bit; rows before it in its own chunk too,
    unless the mean query of the chunk chose other tokens for them, which is the method (`chunk=1` or a long `tail` avoid it)."""
    policy = TokenSelect(top_k=5, sinks=2, local=8, chunk=chunk, tail=0, positions=positions)
    narrow = 0
    for changed in (31, 39, 47):
        logits, chosen = [], []
        for ids in prompts(48, changed):
            cache = PolicyCache(llama, policy)
            with torch.no_grad():
                logits.append(llama(ids, past_key_values=cache).logits[0])
            chosen.append(cache.selected_positions(0))
        narrow += chosen[0].shape[-1] < 48
        first = changed // chunk * chunk  # of its chunk
        assert torch.equal(logits[0][:first], logits[1][:first])
        assert not torch.equal(logits[0][changed], logits[1][changed])
        if chunk == 1:
            assert torch.equal(logits[0][:changed], logits[1][:changed])
    assert narrow == 3


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_rows_of_one_chunk_with_the_same_set_do_not_see_a_later_token(llama, positions, monkeypatch):
    """With the set held fixed the rows before the changed token are the same, bit for bit: attention inside a chunk is causal."""
    from kvpress.policies.tokenselect import VoteSelector

    policy = TokenSelect(top_k=5, sinks=2, local=8, chunk=8, tail=0, positions=positions)
    asked = []

    def fixed(self, view, query):
        asked.append(view)
        slots = torch.tensor([2, 5, 7, 11, 13]).expand(view.keys.shape[0], 1, -1)
        return slots, torch.ones(view.keys.shape[0], dtype=torch.bool)

    monkeypatch.setattr(VoteSelector, "_vote", fixed)
    for changed in (39, 47):
        logits = []
        for ids in prompts(48, changed):
            with torch.no_grad():
                logits.append(llama(ids, past_key_values=PolicyCache(llama, policy)).logits[0])
        assert torch.equal(logits[0][:changed], logits[1][:changed])
        assert float((logits[0][changed:] - logits[1][changed:]).abs().max()) > 1e-3
    assert len(asked) > 10


def test_the_last_tokens_of_a_prompt_ask_for_themselves(llama):
    """A tail row selects as it would alone in a forward."""
    policy = TokenSelect(top_k=5, sinks=2, local=8, chunk=8, tail=3, positions="keep", threshold=2)
    ids = torch.arange(3, 51)[None]
    cache = PolicyCache(llama, policy)
    stepwise = PolicyCache(llama, policy)
    with torch.no_grad():
        together = llama(ids, past_key_values=cache).logits[0, -3:]
        llama(ids[:, :45], past_key_values=stepwise)
    # the tokens before were cut alike only if the earlier tail is the same: compare the first layer, whose input is the tokens alone
    for step in range(45, 48):
        with torch.no_grad():
            llama(ids[:, step : step + 1], past_key_values=stepwise)
    assert torch.equal(cache.selected_positions(0), stepwise.selected_positions(0))
    without = PolicyCache(llama, TokenSelect(top_k=5, sinks=2, local=8, chunk=8, tail=0, positions="keep"))
    with torch.no_grad():
        other = llama(ids, past_key_values=without).logits[0, -3:]
    assert float((together - other).abs().max()) > 1e-6


@pytest.mark.parametrize(
    "policy",
    [
        TidalDecode(top_k=6, dense_layers=0),
        Quest(top_k=8, page_size=4, skip_layers=0),
        TokenSelect(top_k=6, sinks=1, local=4, chunk=4, tail=0, positions="keep"),
    ],
    ids=lambda policy: policy.name,
)
def test_keys_made_from_latents(policy):
    """Such a model attends with more heads of keys than the cache holds; the sets fit them, and few are read."""
    model, text = tiny_model("deepseek_v3", num_hidden_layers=3), random_tokens(1, 36)
    cache = PolicyCache(model, policy)
    with torch.no_grad():
        model(text[:, :30], past_key_values=cache)
        for step in range(30, 36):
            logits = model(text[:, step : step + 1], past_key_values=cache).logits
    read = cache.selected_positions(2)
    assert torch.isfinite(logits).all()
    assert 0 < read.shape[-1] < 30
    assert read.max() < 36
