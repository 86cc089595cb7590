"""Every registered eviction policy is in the table, describes itself, and keeps the promises of all policies."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from policy_table import BUDGETED, EVICTING, PROMISES, ROWS, row

from kvpress import PolicyCache
from kvpress.policies import describe_policies, make_policy, policy_class
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.generation import left_padded

ROOT = Path(__file__).parents[2]
NAMES = [item.name for item in ROWS]
EVICTING_NAMES = [item.name for item in EVICTING]
BUDGETED_NAMES = [item.name for item in BUDGETED]


def test_every_registered_eviction_policy_has_a_row():
    registered = [item.name for item in describe_policies() if item.kind == "eviction"]
    assert sorted(registered) == sorted(NAMES)
    assert all(promise in PROMISES for item in ROWS for promise in item.promises)


@pytest.mark.parametrize("name", [item.name for item in describe_policies()])
def test_it_describes_itself(name):
    found = policy_class(name)
    assert found.name == name and found.kind in ("eviction", "selection")
    assert found.summary and found.paper and found.needs
    assert len(found.__doc__ or "") > 60, "a docstring with the method and its parameters"
    assert "arXiv" in found.paper or found.paper.startswith("none")
    for field in dataclasses.fields(found):
        assert field.name in (found.__doc__ or "") or field.name in ("budget", "interval"), (
            f"{field.name} is not described"
        )
    pages = [path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")] if path.exists()]
    assert any(f"`{name}`" in page or f"`{found.__name__}" in page or f'"{name}"' in page for page in pages), (
        "no docs line"
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_is_frozen_and_survives_json(name):
    policy = make_policy(name, **row(name).small)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.budget = 5
    again = type(policy).from_dict(json.loads(json.dumps(policy.to_dict())))
    assert again == policy and hash(again) == hash(policy)


@pytest.mark.parametrize("name", EVICTING_NAMES)
def test_budgets_hold_at_every_step_and_turn(name):
    """Sizes, order, uniqueness, range; sinks and window; what is gone does not come back."""
    model, budget = tiny_model(), row(name).budget
    policy = make_policy(name, **row(name).small)
    cache = PolicyCache(model, policy)
    ids, mask = left_padded((0, 5), 60)
    start, before = 0, None
    for size in (24, *[1] * 6, 7, *[1] * 3, 2, 1):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start : start + size]
        start += size
        with torch.no_grad():
            model(
                ids[:, start - size : start],
                attention_mask=mask[:, :start],
                position_ids=positions,
                past_key_values=cache,
            )
        kept = [cache.kept_positions(layer).tolist() for layer in range(2)]
        for layer, rows in enumerate(kept):
            for index, heads in enumerate(rows):
                seen = int(mask[index, :start].sum())
                for head, slots in enumerate(heads):
                    held = [position for position in slots if position >= 0]
                    if "not_exact_budget" not in row(name).promises:
                        assert len(held) == min(budget, seen)
                    assert 0 < len(held) <= 2 * budget
                    assert held == sorted(set(held)) and held[-1] < seen
                    assert slots[: len(held)] == held
                    assert set(range(min(policy.protected_sinks, seen))) <= set(held)
                    own = policy.protected_window(len(held))
                    assert set(range(max(seen - own, 0), seen)) <= set(held)
                    if before is not None:
                        past = seen - size
                        assert {position for position in held if position < past} <= set(before[layer][index][head])
                if "one_set" in row(name).promises:
                    assert all(slots == heads[0] for slots in heads)
        before = kept
    assert cache.seen_tokens == start > budget


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("name", EVICTING_NAMES)
def test_chunks_keep_what_the_row_promises(name, size):
    model = tiny_model("llama", dtype=torch.float64)
    whole, chunks = (PolicyCache(model, name, **row(name).small) for _ in range(2))
    ids = random_tokens(1, 28)
    with torch.no_grad():
        model(ids, past_key_values=whole)
        for start in range(0, 28, size):
            model(ids[:, start : start + size], past_key_values=chunks)
    same = [torch.equal(whole.kept_positions(layer), chunks.kept_positions(layer)) for layer in range(2)]
    if "chunk_invariant" in row(name).promises:
        assert same[0]
    if "chunk_invariant_everywhere" in row(name).promises:
        assert all(same)
    assert whole.kept_positions(0).shape[-1] < 28, "nothing was evicted"


@pytest.mark.parametrize("name", EVICTING_NAMES)
def test_the_same_seed_keeps_the_same_tokens(name):
    """Also with another number of threads and another state of torch's generator."""
    kept = []
    for threads, seed in ((1, 0), (2, 1)):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            model = tiny_model()
            cache = PolicyCache(model, name, **row(name).small)
            model.generate(random_tokens(1, 24), past_key_values=cache, max_new_tokens=6, do_sample=False)
        finally:
            torch.set_num_threads(1)
        kept.append([cache.kept_positions(layer) for layer in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize("name", BUDGETED_NAMES)
def test_budget_of_one_more_than_it_must(name):
    """The smallest budget that the policy allows works."""
    model = tiny_model()
    for budget in range(1, 40):
        try:
            policy = make_policy(name, **{**row(name).parameters, "budget": budget})
        except ValueError as error:
            assert f"budget of {name} must be at least" in str(error) and f"got {budget}" in str(error)
            continue
        cache = PolicyCache(model, policy)
        out = model.generate(random_tokens(1, 24), past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert out.shape[1] == 28 and cache.kept_positions(0).shape[-1] <= 2 * budget
        return
    pytest.fail("no budget below 40 is allowed")
