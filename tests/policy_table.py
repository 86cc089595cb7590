"""One row a policy: what every shared test walks. Adding a policy = its file, its name in the registry, and its row here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

ENDLESS = 10_000  # a budget that no test prompt reaches


@dataclass(frozen=True)
class PolicyRow:
    """How the shared tests use an eviction policy.

    Attributes:
        name: as registered.
        parameters: for prompts of about 24 tokens, the budget left out.
        budget: a small one, in tokens; `None` for a policy that never evicts.
        promises: of `PROMISES`.
        limit: the parameter that takes the budget.
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    budget: int | None = 10
    promises: frozenset[str] = frozenset()
    limit: str = "budget"

    @property
    def small(self) -> dict[str, Any]:
        """Parameters with which prompts of the tests lose tokens."""
        return {**self.parameters, **({} if self.budget is None else {self.limit: self.budget})}

    @property
    def endless(self) -> dict[str, Any]:
        """Parameters with which nothing is ever lost."""
        return {**self.parameters, **({} if self.budget is None else {self.limit: ENDLESS})}


PROMISES = {
    "chunk_invariant": "a prompt in chunks keeps the tokens that it keeps in one piece (first layer; what was evicted changes deeper keys)",
    "chunk_invariant_everywhere": "the same in every layer: what is kept depends on positions alone",
    "one_set": "all KV heads of a layer keep the same tokens",
    "not_exact_budget": "layers or heads share the budget unequally, or the method keeps fewer or has a documented slack",
}


def _row(name: str, *promises: str, budget: int | None = 10, limit: str = "budget", **parameters: Any) -> PolicyRow:
    return PolicyRow(name, parameters, budget, frozenset(promises), limit)


SEPARATORS = tuple(range(5, 97, 6))  # token ids


ROWS = (
    _row("full", budget=None),
    _row("streaming_llm", "chunk_invariant", "chunk_invariant_everywhere", "one_set", sinks=2),
    _row("snapkv", window=4, kernel_size=3),
    _row("pyramidkv", "not_exact_budget", window=4, kernel_size=3, beta=4),
    _row("adakv", "not_exact_budget", window=4, kernel_size=3),
    _row("tova", "one_set"),
    _row("h2o"),
    _row("knorm", "chunk_invariant"),
    _row("random", "chunk_invariant", "chunk_invariant_everywhere", seed=7),
    _row("keyformer", steps=8),
    _row("morphkv", window=4),
    _row(
        "sepllm",
        "one_set",
        "not_exact_budget",
        limit="capacity",
        initial=1,
        separators=2,
        window=4,
        token_ids=SEPARATORS,
    ),
)
EVICTING = tuple(row for row in ROWS if row.budget is not None)
BUDGETED = tuple(row for row in EVICTING if row.limit == "budget")


def row(name: str) -> PolicyRow:
    """The row of a policy."""
    return next(item for item in ROWS if item.name == name)


EVERYTHING = os.environ.get("KVPRESS_TEST_EVERYTHING") == "1"


def pairs(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(policy, family, way) such that every policy meets every family and every core way, every family every core way, and every way
    a third of the policies.

    All combinations with `KVPRESS_TEST_EVERYTHING=1`.
    """
    from kvpress.testing.families import FAMILIES
    from kvpress.testing.generation import CORE, ROLLING_BACK, WAYS

    names = list(names)
    chosen = []
    for f, family in enumerate(FAMILIES):
        for w, way in enumerate(WAYS):
            if family == "qwen3_next" and way in ROLLING_BACK:
                continue  # recurrent: transformers refuses to roll back
            for p, policy in enumerate(names):
                mine = CORE[(f + p) % len(CORE)] == way  # every policy with every family, each family in every core way
                if family == "qwen3_next" and CORE[(f + p) % len(CORE)] in ROLLING_BACK:
                    mine = way == "turns"
                if EVERYTHING or mine or (family == "llama" and (way in CORE or (w + p) % 3 == 0)):
                    chosen.append((policy, family, way))
    return chosen
