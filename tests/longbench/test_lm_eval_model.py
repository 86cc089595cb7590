"""The harness's model against HFLM itself: equal with a full budget, different with a small one."""

import copy

import pytest

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from kvpress.longbench.harness import PolicyLM

CONTEXT = "The keeper of the harbour spoke of the green noun and of the valley. " * 6
PAIRS = [(CONTEXT, " A word."), (CONTEXT, " Another"), ("Short", " end"), (CONTEXT, " x")]


@pytest.fixture
def build(model, tokenizer):
    def make(cls, **options):
        return cls(pretrained=copy.deepcopy(model), tokenizer=copy.deepcopy(tokenizer), batch_size=2, **options)

    return make


def requests(kind, arguments):
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def test_it_is_registered():
    assert get_model("kvpress") is PolicyLM


@pytest.mark.parametrize("options", [{}, {"policy": "streaming_llm", "budget": "2000"}])
def test_log_likelihoods_equal_those_of_hflm_without_loss(build, options):
    expected = build(HFLM).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    found = build(PolicyLM, **options).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert len({score for score, _ in expected}) == 4
    for (score, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert score == pytest.approx(wanted, abs=1e-3) and greedy == wanted_greedy


def test_compression_changes_long_contexts_only(build):
    full = build(PolicyLM).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    small = build(PolicyLM, policy="streaming_llm", budget=16).loglikelihood(
        requests("loglikelihood", PAIRS), disable_tqdm=True
    )
    differences = [abs(a - b) for (a, _), (b, _) in zip(full, small, strict=True)]
    assert max(differences[:2]) > 1e-3 and differences[2] < 1e-4


def test_generation_uses_a_fresh_cache_for_each_call(build):
    arguments = [(text, {"until": ["\n"], "max_gen_toks": 6}) for text in (CONTEXT, "Short", CONTEXT)]
    expected = build(HFLM).generate_until(requests("generate_until", arguments), disable_tqdm=True)
    lossless = build(PolicyLM, policy="streaming_llm", budget=2000)
    assert lossless.generate_until(requests("generate_until", arguments), disable_tqdm=True) == expected
    small = build(PolicyLM, policy="streaming_llm", budget=16)
    found = small.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert found != expected and found[0] == found[2]


def test_refusals(build):
    with pytest.raises(NotImplementedError, match="no context to compress"):
        build(PolicyLM).loglikelihood_rolling([])
    with pytest.raises(ValueError, match="snapkv"):
        build(PolicyLM, policy="snapkw", budget=1)
