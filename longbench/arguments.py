"""Values as they are written on the command line."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from kvpress.policies.registry import policy_class, policy_names

from .runner.method import FULL, Budget, Method


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """`snapkv` or `snapkv:window=32,pooling=max`; values are read as JSON, and as text where they are not JSON.

    Raises:
        ValueError: a parameter without `=`.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise ValueError(f"policy parameters must be written as name=value, not {item!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return name, options


def parse_budget(text: str) -> Budget:
    """`1024` is tokens, `0.25` a share of the prompt, anything else text such as `256MB`, which the policy checks."""
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def parse_methods(policies: Sequence[str], budgets: Sequence[str], *, full: bool) -> list[Method]:
    """Every policy at every budget, after the full cache if `full`; a policy that takes no budget comes once.

    Raises:
        ValueError: nothing to evaluate.
    """
    chosen = [parse_budget(budget) for budget in budgets] or [None]
    methods = [FULL] if full else []
    for name, options in map(parse_policy, policies):
        if name != "full" or options:
            methods += [Method(name, budget, options) for budget in (chosen if _takes_budget(name) else [None])]
    if not methods:
        raise ValueError("policy must name at least one policy when the full cache is left out")
    return methods


def _takes_budget(name: str) -> bool:
    """Whether a policy has the parameter `budget`; an unknown one is refused later, by the cache."""
    if name not in policy_names():
        return True
    return any(field.name == "budget" and field.init for field in fields(policy_class(name)))


def parse_numbers(text: str, name: str) -> list[float]:
    """`1024,2048` as numbers.

    Raises:
        ValueError: not a list of numbers; names the option.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} must be numbers separated by commas, not {text!r}") from error


def parse_names(text: str, known: Sequence[str], name: str) -> list[str]:
    """`all`, or names separated by commas.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    names = list(known) if text == "all" else text.split(",")
    for item in names:
        if item not in known:
            raise ValueError(f"{name} must be among {', '.join(known)}, not {item!r}")
    return names
