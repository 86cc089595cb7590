"""One row a policy: what every shared test walks. Adding a policy = its file, its name in the registry, and its row here."""

from __future__ import annotations

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
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    budget: int | None = 10
    promises: frozenset[str] = frozenset()

    @property
    def small(self) -> dict[str, Any]:
        """Parameters with which prompts of the tests lose tokens."""
        return {**self.parameters, **({} if self.budget is None else {"budget": self.budget})}

    @property
    def endless(self) -> dict[str, Any]:
        """Parameters with which nothing is ever lost."""
        return {**self.parameters, **({} if self.budget is None else {"budget": ENDLESS})}


PROMISES = {
    "chunk_invariant": "a prompt in chunks keeps the tokens that it keeps in one piece (first layer; deeper keys differ by what was evicted)",
    "chunk_invariant_everywhere": "the same in every layer: what is kept depends on positions alone",
    "one_set": "all KV heads of a layer keep the same tokens",
    "not_exact_budget": "the method keeps fewer tokens than its budget, or has a documented slack",
}


def _row(name: str, *promises: str, budget: int | None = 10, **parameters: Any) -> PolicyRow:
    return PolicyRow(name, parameters, budget, frozenset(promises))


ROWS = (
    _row("full", budget=None),
    _row("streaming_llm", "chunk_invariant", "chunk_invariant_everywhere", "one_set", sinks=2),
    _row("snapkv", window=4, kernel_size=3),
    _row("pyramidkv", window=4, kernel_size=3, beta=4),
    _row("adakv", "not_exact_budget", window=4, kernel_size=3),
    _row("tova", "one_set"),
    _row("h2o"),
    _row("knorm", "chunk_invariant"),
    _row("random", "chunk_invariant", "chunk_invariant_everywhere", seed=7),
)
EVICTING = tuple(row for row in ROWS if row.budget is not None)


def row(name: str) -> PolicyRow:
    """The row of a policy."""
    return next(item for item in ROWS if item.name == name)
