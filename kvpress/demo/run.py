"""The demo: the same question with the full cache and with every policy at a share of the tokens."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvpress.cache import PolicyCache
from kvpress.console import progress_bar
from kvpress.demo.measure import QUERY_AGNOSTIC, QUERY_AWARE, Measurement, measure
from kvpress.demo.passkey import PasskeyTask, make_task
from kvpress.policies import make_policy, policy_class, policy_names
from kvpress.policy_table import budget_options

STOCK = "DynamicCache"
FULL = "full"
FULL_SIZE_TOKENS = 3000
QUICK_TOKENS = 1000
QUICK_POLICIES = ("streaming_llm", "snapkv", "knorm")


@dataclass(frozen=True)
class DemoResult:
    """All runs of one demo.

    Attributes:
        key: the hidden number.
        prompt_tokens: length of the prompt.
        budget: tokens each policy may keep per KV head and layer.
        runs: the runs, the stock cache's first.
        kv_dtype: how the compressing policies' caches stored keys and values.
    """

    key: str
    prompt_tokens: int
    budget: int
    runs: tuple[Measurement, ...]
    kv_dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "prompt_tokens": self.prompt_tokens,
            "budget": self.budget,
            "kv_dtype": self.kv_dtype,
            "runs": [run.to_dict() for run in self.runs],
        }


def chosen_policies(names: list[str] | None, *, quick: bool = False) -> list[str]:
    """The compressing policies to show, without `full`, which is always shown.

    Raises:
        ValueError: a name is not registered; near names are suggested.
    """
    if names:
        return [name for name in names if policy_class(name).name != FULL]
    return list(QUICK_POLICIES) if quick else [name for name in policy_names() if name != FULL]


@dataclass(frozen=True)
class DemoPlan:
    """What a demo will run.

    Attributes:
        task: the prompt.
        budget: tokens each policy may keep per KV head and layer.
        policies: names of the compressing policies.
        kv_dtype: how their caches store keys and values, see `PolicyCache`; `full` stores them in the model's type.
    """

    task: PasskeyTask
    budget: int
    policies: tuple[str, ...]
    kv_dtype: str | None = None

    def runs(self) -> list[tuple[str, str]]:
        """(policy, mode) of each run. The stock cache comes first, before any policy has touched the model."""
        names = (FULL, *self.policies)
        return [(STOCK, QUERY_AWARE), *((name, mode) for mode in (QUERY_AWARE, QUERY_AGNOSTIC) for name in names)]


def plan_demo(
    tokenizer: Any,
    policies: list[str],
    *,
    tokens: int,
    share: float = 0.25,
    seed: int = 0,
    depth: float = 0.5,
    kv_dtype: str | None = None,
) -> DemoPlan:
    """Write the prompt and check the budget against every policy.

    Args:
        tokenizer: as `load_model` gives it.
        policies: names of registered policies; `full` and transformers' own cache are added.
        tokens: length of the prompt.
        share: share of the prompt's tokens that a policy may keep, above 0 and at most 1.
        seed, depth: which prompt, and where in it the key lies (0 to 1).
        kv_dtype: of the compressing policies' caches.

    Raises:
        ValueError: tokens, depth or share is out of range, or a policy refuses the budget.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie above 0 and at most at 1, got {share}")
    task = make_task(tokenizer, tokens, seed=seed, depth=depth)
    budget = math.ceil(share * task.prompt_ids.shape[1])
    for name in policies:
        make_policy(name, **budget_options(name, budget))
    return DemoPlan(task, budget, tuple(policies), kv_dtype)


def run_demo(model: Any, tokenizer: Any, plan: DemoPlan) -> DemoResult:
    """Ask for the pass key with each cache of the plan.

    Raises:
        ValueError: the model is one that PolicyCache refuses.
    """
    runs = []
    with progress_bar(remaining=True) as progress:
        bar = progress.add_task("Warming up", total=len(plan.runs()))
        warm_up(model, plan.task)
        for name, mode in plan.runs():
            progress.update(bar, description=f"{name}, {mode}")
            cache = new_cache(model, name, plan.budget, plan.kv_dtype)
            runs.append(measure(model, tokenizer, plan.task, name, mode, cache))
            progress.advance(bar)
    return DemoResult(plan.task.key, int(plan.task.prompt_ids.shape[1]), plan.budget, tuple(runs), plan.kv_dtype)


def new_cache(model: Any, name: str, budget: int, kv_dtype: str | None = None) -> Any:
    """An empty cache of a policy that keeps `budget` tokens, or transformers' own."""
    if name == STOCK:
        return DynamicCache(config=model.config)
    options: dict[str, Any] = budget_options(name, budget)
    return PolicyCache(model, name, kv_dtype=None if name == FULL else kv_dtype, **options)


def warm_up(model: Any, task: PasskeyTask) -> None:
    """One short forward, so that the first run does not pay for what happens only once."""
    with torch.no_grad():
        model(task.context_ids[:, :32].to(model.device), use_cache=False)
