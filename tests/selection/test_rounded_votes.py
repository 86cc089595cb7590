"""Votes on int8 and int4 keys: against fp64 votes on keys, and of int4 on queries too, that are rounded once more."""

import dataclasses

import pytest
import torch
from test_tokenselect_sets import SMALL, cut, voter

from kvpress.policies import SnapKV, StreamingLLM, TokenSelect, key_index
from kvpress.testing import hadamard_oracle
from kvpress.testing.families import tiny_model


def rounded_int8(keys, levels=127):
    """Once more, in fp64: what int8 codes with a scale for each row stand for."""
    scale = keys.double().abs().amax(dim=-1, keepdim=True) / levels
    return torch.where(scale > 0, (keys.double() / scale).round() * scale, 0.0)


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of the index, and what rounds as it does."""

    index: str
    first: int = 1000  # tokens that make a centre; more than there are: none

    def policy(self, **changes):
        return TokenSelect(**{**SMALL, "tail": 2, "threshold": 0.0, "index": self.index, **changes})

    def rounded(self, keys, levels):
        if self.index == "int8":
            return rounded_int8(keys, levels or 127)
        middle = keys[:, : self.first].mean(dim=1, keepdim=True) if keys.shape[1] >= self.first else 0
        return hadamard_oracle.rounded(keys - middle, levels or 7)

    def voter(self, policy, *, levels=None, asked=127, **changes):
        """The method on rounded keys, asked by rounded queries where the index is int4."""
        ask = {} if self.index == "int8" else {"ask": lambda query: hadamard_oracle.rounded(query, asked)}

        def make():
            choose = voter(policy, **ask, **changes)()
            return lambda question: choose(
                dataclasses.replace(
                    question,
                    keys=self.rounded(question.keys, levels),
                    plain_keys=self.rounded(question.plain_keys, levels),
                )
            )

        return make


INT8, INT4 = Form("int8"), Form("int4")
CENTRED = Form("int4", first=17)  # each row has so many tokens some day, but not at once
NAMES = {INT8: "int8", INT4: "int4", CENTRED: "int4 centred"}
SABOTAGES = [
    (INT8, "coarser keys", lambda policy: INT8.voter(policy, levels=15)),
    (CENTRED, "finer keys", lambda policy: CENTRED.voter(policy, levels=8)),
    (CENTRED, "no centre", INT4.voter),
    (CENTRED, "coarser queries", lambda policy: CENTRED.voter(policy, asked=7)),
    *[(form, "exact keys", voter) for form in (INT8, CENTRED)],
    (INT8, "one token fewer", lambda policy: INT8.voter(policy, count=policy.top_k - 1)),
    (CENTRED, "one token fewer", lambda policy: CENTRED.voter(policy, count=policy.top_k - 1)),
]


@pytest.fixture(params=NAMES, ids=NAMES.values())
def form(request, monkeypatch):
    monkeypatch.setattr(key_index, "FIRST", request.param.first)
    return request.param


@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_sets_equal_a_vote_on_rounded_keys(compare, form, positions, heads):
    model = tiny_model("llama", dtype=torch.float64, num_key_value_heads=heads)
    policy = form.policy(positions=positions)
    fed, result = compare(model, policy, form.voter(policy), blocks=cut(policy), reindex=positions == "reindex")
    assert result.error < 1e-9
    assert result.narrowed > 8
    assert result.sets == 2 * 13
    behind = [layer.table.count - layer.selector.index.covered for layer in fed.cache.policy_layers]
    assert 0 <= min(behind) <= max(behind) <= policy.local


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_padded_rows_chunks_and_turns(compare, form, llama, positions):
    policy = form.policy(positions=positions)
    _, result = compare(
        llama,
        policy,
        form.voter(policy),
        blocks=cut(policy),
        reindex=positions == "reindex",
        batch=3,
        pads=(0, 14, 5),
        sizes=(9, 20, 1, 1, 1, 1, 14, 1, 1, 1),
    )
    assert result.error < 1e-9
    assert result.narrowed > 3


@pytest.mark.parametrize("form", [INT8, INT4], ids=NAMES.get, indirect=True)
@pytest.mark.parametrize(
    ("eviction", "shared"),
    [(SnapKV(budget=24, window=6, kernel_size=3), False), (StreamingLLM(budget=24, sinks=3), True)],
    ids=["snapkv", "streaming_llm"],
)
def test_composed_with_eviction(compare, form, llama, eviction, shared):
    policy = form.policy(top_k=4, local=6, chunk=6, positions="keep", tail=0)
    fed, result = compare(
        llama, [eviction, policy], form.voter(policy, shared=shared), blocks=cut(policy), held=True,
        sizes=(40, *[1] * 12, 9, *[1] * 6) if shared else (40, *[1] * 12),
    )  # fmt: skip
    assert fed.cache.report().evictions > 0
    assert result.error < 1e-9
    assert result.narrowed > 12


@pytest.mark.parametrize(
    ("form", "sabotage"),
    [pytest.param(form, make, id=f"{NAMES[form]}, {name}") for form, name, make in SABOTAGES],
    indirect=["form"],
)
def test_sabotaged_formulas_are_caught(compare, form, llama, sabotage):
    policy, sizes = form.policy(positions="keep", tail=0, threshold=2), (40, *[1] * 40)
    compare(llama, policy, form.voter(policy), blocks=cut(policy), sizes=sizes)
    with pytest.raises(AssertionError):
        compare(llama, policy, sabotage(policy), blocks=cut(policy), sizes=sizes)
