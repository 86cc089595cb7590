"""What is profiled: the stock cache, and policies at budgets, as they are written on a command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpress.cli_arguments import parse_budget, parse_settings
from kvpress.policies import make_policy, policy_names
from kvpress.policies.base import Policy
from kvpress.policies.budget import Budget, BudgetValue
from kvpress.policies.registry import policy_class
from kvpress.policy_table import budget_options
from kvpress.row_format import row_format

STOCK = "stock"  # the model's own cache and attention


@dataclass(frozen=True)
class Candidate:
    """One cache to measure.

    Attributes:
        name: a registered policy, or `STOCK`.
        budget: tokens, a share of the prompt, or bytes; of a selection policy the tokens attended to. `None` where it takes none.
        options: its other parameters.
        kv_dtype: how keys and values are stored, see `PolicyCache`.
    """

    name: str
    budget: BudgetValue | None = None
    options: dict[str, Any] = field(default_factory=dict)
    kv_dtype: str | None = None

    @property
    def label(self) -> str:
        """`snapkv@0.25`, with the other parameters in brackets."""
        budget = "" if self.budget is None else f"@{self.budget}"
        given = self.options if self.kv_dtype is None else {**self.options, "kv_dtype": self.kv_dtype}
        options = ",".join(f"{name}={value}" for name, value in sorted(given.items()))
        return self.name + budget + (f"[{options}]" if options else "")

    def policy(self, context: int) -> Policy | None:
        """The policy for prompts of `context` tokens; `None` for the stock cache.

        Raises:
            ValueError: parameters that the policy refuses, or bytes for a policy that selects.
        """
        if self.name == STOCK:
            return None
        policy_class(self.name)  # an unknown name first
        given = dict(self.options)
        if self.budget is not None:
            (parameter,) = budget_options(self.name, 1)
            given[parameter] = self.budget if parameter == "budget" else self._tokens(context)
        return make_policy(self.name, **given)

    def _tokens(self, context: int) -> int:
        budget = Budget.parse(self.budget if self.budget is not None else 1)
        if budget.size is not None:
            raise ValueError(
                f"budget of {self.name} must be tokens or a share, it keeps everything and attends to a part, got {self.budget!r}"
            )
        return budget.resolve([context], 1)[0]


def parse_policies(texts: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """`["snapkv:window=64,pooling=avg,tova", "full"]` as names with parameters; `all` is every registered policy.

    A piece with `=` is a parameter of the policy before it, or `kv_dtype` of its cache; its value is read as JSON, and as text where it is
    not JSON.

    Raises:
        ValueError: a parameter that follows no policy, or an empty name.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for text in texts:
        for piece in text.split(","):
            name, colon, first = piece.partition(":")
            if "=" in name:
                if not found or ":" not in text:
                    raise ValueError(f"policies must be written as name or name:parameter=value,…, got {text!r}")
                _add(found[-1][1], piece)
            elif name == "all":
                found += [(known, {}) for known in policy_names()]
            elif name.strip():
                found.append((name.strip(), {}))
                if colon:
                    _add(found[-1][1], first)
            else:
                raise ValueError(f"policies must be names separated by commas, got {text!r}")
    return found


def _add(options: dict[str, Any], item: str) -> None:
    for name, value in parse_settings([item], field="a policy's parameters").items():
        if name in options:
            raise ValueError(f"a policy's parameters must give each name once, {name!r} comes twice")
        options[name] = value


def make_candidates(
    policies: Sequence[str], budgets: Sequence[str], *, stock: bool, kv_dtype: str | None = None
) -> list[Candidate]:
    """Every policy at every budget, each once; the stock cache first.

    Args:
        policies: as `parse_policies` takes them.
        budgets: `1024`, `0.25`, `256MB`, or several separated by commas.
        kv_dtype: of the policies that name none of their own.

    Raises:
        ValueError: nothing to measure, an unknown policy (the message suggests near names), or a value that a policy refuses.
    """
    values = [parse_budget(item.strip()) for text in budgets for item in text.split(",")]
    for value in values:
        Budget.parse(value)  # also where no policy takes one
    row_format(kv_dtype)
    chosen = [Candidate(STOCK)] if stock else []
    for name, options in parse_policies(policies):
        if name == STOCK:
            chosen.append(Candidate(STOCK))
            continue
        policy_class(name)
        own = options.pop("kv_dtype", kv_dtype)
        row_format(own)
        takes = budget_options(name, 1)
        sizes = values if takes and not set(takes) & set(options) else [None]
        chosen += [Candidate(name, size, options, own) for size in sizes]
    unique = list({candidate.label: candidate for candidate in chosen}.values())
    if not unique:
        raise ValueError("policies must name at least one policy when the stock cache is left out")
    for candidate in unique:
        candidate.policy(1 << 20)  # refuses what is wrong before anything is loaded
    return unique
