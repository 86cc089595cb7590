"""The demo on a tiny random model: what is run, what is measured, what is said."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from kvpress.demo import chosen_policies, demo_table, plan_demo, run_demo, verdict
from kvpress.demo.measure import QUERY_AGNOSTIC, QUERY_AWARE
from kvpress.demo.run import FULL, STOCK, DemoPlan, DemoResult
from kvpress.demo.table import full_cache_agrees
from kvpress.policies import policy_names
from kvpress.testing.tiny_checkpoint import tiny_model, tiny_tokenizer

BYTES_PER_TOKEN = 4 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head_dim, float32


@pytest.fixture(scope="module")
def plan() -> DemoPlan:
    return plan_demo(tiny_tokenizer(), ["streaming_llm", "snapkv"], tokens=500, share=0.25)


@pytest.fixture(scope="module")
def result(plan: DemoPlan) -> DemoResult:
    return run_demo(tiny_model(), tiny_tokenizer(), plan)


def test_every_policy_runs_in_both_modes_after_the_full_caches(result: DemoResult) -> None:
    assert [(run.policy, run.mode) for run in result.runs] == [
        (STOCK, QUERY_AWARE),
        (FULL, QUERY_AWARE),
        ("streaming_llm", QUERY_AWARE),
        ("snapkv", QUERY_AWARE),
        (FULL, QUERY_AGNOSTIC),
        ("streaming_llm", QUERY_AGNOSTIC),
        ("snapkv", QUERY_AGNOSTIC),
    ]


def test_tokens_and_bytes_are_those_of_the_caches(result: DemoResult) -> None:
    new_tokens = 10
    assert result.budget == -(-result.prompt_tokens // 4)
    for run in result.runs:
        assert result.prompt_tokens < run.seen_tokens < result.prompt_tokens + new_tokens
        assert run.full_bytes == pytest.approx(run.seen_tokens * BYTES_PER_TOKEN, rel=0.02)
        if run.policy in (STOCK, FULL):
            assert run.kept_tokens == run.seen_tokens
        else:
            assert run.kept_tokens == result.budget
            assert run.held_bytes < 0.5 * run.full_bytes  # the policies' own columns weigh much beside 8 dimensions


def test_the_full_policy_answers_as_the_stock_cache(plan: DemoPlan, result: DemoResult) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = plan.task.prompt_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer
    assert [run.answer for run in result.runs if run.policy in (STOCK, FULL)] == [answer] * 3
    assert full_cache_agrees(result)


def test_times_are_positive(result: DemoResult) -> None:
    for run in result.runs:
        assert run.prefill_seconds > 0
        assert run.token_milliseconds is not None
        assert run.token_milliseconds > 0


def test_the_table_has_a_row_a_run(result: DemoResult) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123
    console.print(demo_table(result))
    text = console.export_text()
    for run in result.runs:
        row = next(line for line in text.splitlines() if run.policy in line and run.mode in line)
        assert f"{run.kept_tokens:,.0f} / {run.seen_tokens:,}" in row
        assert ("right" if run.right else "wrong") in row


def test_the_verdict_names_who_loses_the_key(result: DemoResult) -> None:
    rights = (True, True, False, True, True, False, False)
    runs = tuple(replace(run, right=right) for run, right in zip(result.runs, rights, strict=True))
    text = "\n".join(verdict(replace(result, runs=runs)))
    assert "Keep the key: snapkv (aware)." in text
    assert "Lose the key: streaming_llm (aware and agnostic), snapkv (agnostic)." in text
    assert "say nothing" not in text


def test_the_verdict_says_when_the_full_cache_fails(result: DemoResult) -> None:
    runs = tuple(replace(run, right=False, answer="") for run in result.runs)
    assert any("say nothing about the policies" in line for line in verdict(replace(result, runs=runs)))
    other = (replace(result.runs[0], answer="otherwise"), *result.runs[1:])
    assert not full_cache_agrees(replace(result, runs=other))
    assert any("fault of this package" in line for line in verdict(replace(result, runs=other)))


def test_all_registered_policies_are_shown_unless_some_are_named() -> None:
    assert chosen_policies(None) == [name for name in policy_names() if name != FULL]
    assert chosen_policies(["tova", "full"]) == ["tova"]
    assert set(chosen_policies(None, quick=True)) < set(policy_names())
    with pytest.raises(ValueError, match="snapkv"):
        chosen_policies(["snapkw"])


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must lie above 0"):
        plan_demo(tiny_tokenizer(), ["snapkv"], tokens=500, share=share)


def test_a_budget_that_a_policy_refuses_is_refused_before_any_run() -> None:
    with pytest.raises(ValueError, match="budget of snapkv"):
        plan_demo(tiny_tokenizer(), ["snapkv"], tokens=400, share=0.05)
