"""TokenSelect against its formulas (arXiv 2411.02886, equations 5-7 and algorithm 1), in fp64."""

import pytest
import torch

from kvpress.policies import SnapKV, StreamingLLM, TokenSelect
from kvpress.testing.families import tiny_model

SMALL = {"top_k": 5, "sinks": 2, "local": 8, "chunk": 8}


def cut(policy):
    """Blocks of a prompt: chunks from its first token on, then `tail` rows each for itself."""

    def blocks(rows):
        tail = min(policy.tail, rows - 1)
        chunks, first = [], 0
        while first < rows - tail:
            chunks.append((first, min(first + policy.chunk, rows - tail)))
            first += policy.chunk
        return chunks + [(row, row + 1) for row in range(rows - tail, rows)]

    return blocks


def voter(policy, *, shared=True, reuse=True, scaled=False, wrong_mean=False, count=None, ask=lambda query: query):
    """The method once more: sinks, local window, and the tokens with most votes; `ask` is what keys are multiplied with."""

    def choose(question):
        heads, kv_heads = question.query.shape[0], question.keys.shape[0]
        limit = policy.sinks + policy.top_k + policy.local
        if not question.decoding:
            question.state.pop("query", None)
        if max(map(len, question.held)) <= limit:
            return None
        query, keys = question.query.mean(dim=1), question.keys
        if wrong_mean:
            query = question.query[:, -1]
        if policy.positions == "reindex":
            query, keys = question.plain_query.mean(dim=1), question.plain_keys
            query = question.rotate(query[:, None], torch.tensor([policy.local]))[:, 0]
        ends = lambda held: [p for p in held if p < policy.sinks or p > question.last - 1 - policy.local]  # noqa: E731
        # algorithm 1 compares queries as the layer has them
        flat = (question.plain_query if policy.positions == "reindex" else question.query).mean(dim=1).flatten()
        old = question.state.get("query")
        if question.decoding and reuse and old is not None:
            cosine = float(flat @ old / flat.norm() / old.norm())
            question.state["cosines"] = [*question.state.get("cosines", []), cosine]
            if cosine >= policy.threshold:
                question.state["hits"] = question.state.get("hits", 0) + 1
                return [
                    ends(held) + [p for p in chosen if p in held]
                    for held, chosen in zip(question.held, question.state["chosen"], strict=True)
                ]
        votes = torch.full((kv_heads, question.last), 0.0, dtype=torch.float64)
        for head in range(heads):
            owner = head * kv_heads // heads if policy.group == "floor" else head % kv_heads
            candidates = [p for p in question.held[owner] if policy.sinks <= p <= question.last - 1 - policy.local]
            dots = keys[owner, candidates] @ ask(query[head])
            if scaled:
                dots = dots * query.shape[-1] ** -0.5
            votes[owner, candidates] += dots.softmax(dim=0)
        if shared:
            votes = votes.sum(dim=0, keepdim=True).expand(kv_heads, -1)
        chosen = []
        for owner in range(kv_heads):
            candidates = [p for p in question.held[owner] if policy.sinks <= p <= question.last - 1 - policy.local]
            chosen.append(
                sorted(candidates, key=lambda p: (-round(float(votes[owner, p]), 12), -p))[: count or policy.top_k]
            )
        if question.decoding:
            question.state.update(query=flat, chosen=chosen, misses=question.state.get("misses", 0) + 1)
        return [ends(held) + picked for held, picked in zip(question.held, chosen, strict=True)]

    return lambda: choose


@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("tail", [0, 3])
def test_sets_and_logits_equal_the_formulas(compare, positions, heads, tail):
    model = tiny_model("llama", dtype=torch.float64, num_key_value_heads=heads)
    policy = TokenSelect(**SMALL, positions=positions, tail=tail, threshold=0.0)
    fed, result = compare(model, policy, voter(policy), blocks=cut(policy), reindex=positions == "reindex")
    assert result.error < 1e-9
    assert result.narrowed > 8
    assert result.sets == 2 * 13
    states = result.oracles[0].states.values()
    report = fed.cache.report()
    assert report.selections_reused == sum(state.get("hits", 0) for state in states)
    decoded = sum(state["misses"] for state in states)
    assert report.selections == decoded


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_padded_rows_chunks_and_turns_equal_each_row_alone(compare, llama, positions):
    policy = TokenSelect(**SMALL, positions=positions, tail=2, threshold=0.0)
    sizes = (9, 20, 1, 1, 1, 1, 14, 1, 1, 1)  # a prompt in two pieces, decoding, another turn, decoding
    fed, result = compare(
        llama,
        policy,
        voter(policy),
        blocks=cut(policy),
        reindex=positions == "reindex",
        batch=3,
        pads=(0, 14, 5),
        sizes=sizes,
    )
    assert result.error < 1e-9
    assert result.narrowed > 3
    assert fed.cache.report().selections_reused > 0


def test_a_row_that_is_too_short_to_select_does_not_seed_the_selection_cache(compare, llama):
    """Row 1 crosses the length from which it selects while row 0 already reuses."""
    policy = TokenSelect(**SMALL, positions="keep", tail=0, threshold=-1.0)  # every later step reuses
    _, result = compare(llama, policy, voter(policy), blocks=cut(policy), batch=2, pads=(0, 18), sizes=(30, *[1] * 10))
    assert result.error < 1e-9
    first, second = result.oracles
    assert all(state["hits"] == 9 for state in first.states.values())
    assert all(0 < state["hits"] < 9 for state in second.states.values())


@pytest.mark.parametrize("group", ["floor", "mod"])
def test_group_mapping(compare, group):
    """Four query heads on two KV heads: floor pairs 0,0,1,1 and mod 0,1,0,1, with other sets."""
    model = tiny_model("llama", dtype=torch.float64, num_attention_heads=4, num_key_value_heads=2)
    policy = TokenSelect(**SMALL, positions="keep", tail=0, threshold=2, group=group)
    _, result = compare(model, policy, voter(policy), blocks=cut(policy))
    assert result.error < 1e-9
    other = TokenSelect(**SMALL, positions="keep", tail=0, threshold=2, group="mod" if group == "floor" else "floor")
    with pytest.raises(AssertionError):
        compare(model, policy, voter(other), blocks=cut(policy))


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_composed_with_snapkv_each_head_selects_among_what_it_keeps(compare, llama, positions):
    policy = TokenSelect(top_k=4, sinks=2, local=6, chunk=6, positions=positions, tail=0, threshold=0.0)
    fed, result = compare(
        llama,
        [SnapKV(budget=24, window=6, kernel_size=3), policy],
        voter(policy, shared=False),
        blocks=cut(policy),
        reindex=positions == "reindex",
        held=True,
    )
    assert fed.cache.report().evictions > 0
    assert result.error < 1e-9
    assert result.narrowed > 12
    last = fed.selected[-1][1]
    assert last.dim() == 3
    assert not torch.equal(last[0, 0], last[0, 1]), "KV heads chose the same: nothing was told apart"


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_composed_with_streaming_llm_one_set_serves_all_heads(compare, llama, positions):
    policy = TokenSelect(top_k=4, sinks=2, local=6, chunk=6, positions=positions, tail=0, threshold=0.0)
    fed, result = compare(
        llama,
        [StreamingLLM(budget=24, sinks=3), policy],
        voter(policy),
        blocks=cut(policy),
        reindex=positions == "reindex",
        held=True,
        sizes=(40, *[1] * 12, 9, *[1] * 6),
        batch=2,
        pads=(0, 7),
    )
    assert result.error < 1e-9
    assert result.narrowed > 12
    assert fed.selected[-1][0].dim() == 2


def sabotages(policy):
    return {
        "scaled dot products": voter(policy, scaled=True),
        "last query instead of the mean": voter(policy, wrong_mean=True),
        "one token fewer": voter(policy, count=policy.top_k - 1),
        "heads select apart": voter(policy, shared=False),
        "no selection cache": voter(policy, reuse=False),
    }


@pytest.mark.parametrize("kind", sabotages(TokenSelect(**SMALL)))
def test_sabotaged_formulas_are_caught(compare, llama, kind):
    policy = TokenSelect(**SMALL, positions="keep", tail=0, threshold=0.0)
    with pytest.raises(AssertionError):
        compare(llama, policy, sabotages(policy)[kind], blocks=cut(policy))


def test_the_other_regime_is_caught(compare, llama):
    policy = TokenSelect(**SMALL, positions="reindex", tail=0, threshold=2)
    _, result = compare(llama, policy, voter(policy), blocks=cut(policy), reindex=True)
    assert result.error < 1e-9
    with pytest.raises(AssertionError):
        _, result = compare(llama, policy, voter(policy), blocks=cut(policy), reindex=False)
        assert result.error < 1e-6
