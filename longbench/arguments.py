"""Values as they are written on the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from kvpress.cli_arguments import parse_budget, parse_settings
from kvpress.policies.registry import make_policy, policy_class
from kvpress.row_format import row_format

from .runner.method import FULL, Budget, Method


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """`snapkv` or `snapkv:window=32,pooling=max`; values are read as JSON, and as text where they are not JSON.

    Raises:
        ValueError: a parameter without `=`, or given twice.
    """
    name, _, rest = text.partition(":")
    return name, parse_settings(list(filter(None, rest.split(","))), field="policy parameters")


def parse_methods(
    policies: Sequence[str],
    budgets: Sequence[str],
    *,
    full: bool,
    kv_dtype: str | None = None,
    offload: Mapping[str, Any] | None = None,
) -> list[Method]:
    """Every policy at every budget, after the full cache if `full`; a policy that takes no budget comes once.

    Args:
        policies: as `parse_policy` takes them; `kv_dtype` among the parameters is of the policy's cache.
        budgets: as `kvpress.cli_arguments.parse_budget` takes them.
        kv_dtype: of the policies that name none of their own.
        offload: arguments of the `kvpress.offload.Offload` of every policy's cache; the full cache stays as it is.

    Raises:
        ValueError: nothing to evaluate, an unknown policy (the message suggests near names), or a value that it refuses.
    """
    chosen: list[Budget] = [parse_budget(budget) for budget in budgets] or [None]
    methods = [FULL] if full else []
    for name, options in map(parse_policy, policies):
        if kv_dtype is not None:
            options.setdefault("kv_dtype", kv_dtype)
        if name != "full" or options or offload is not None:
            sizes: list[Budget] = chosen if _takes_budget(name) else [None]
            methods += [Method(name, budget, options, offload) for budget in sizes]
    if not methods:
        raise ValueError("policy must name at least one policy when the full cache is left out")
    for method in methods:
        _check(method)
    return methods


def _check(method: Method) -> None:
    """Refuse what the cache would refuse, before a model is loaded."""
    given = dict(method.options)
    row_format(given.pop("kv_dtype", None))
    if method.budget is not None:
        given["budget"] = method.budget
    make_policy(method.policy, **given)


def _takes_budget(name: str) -> bool:
    """Whether a policy can be given a budget; `full`, which keeps every token, refuses one."""
    return name != "full" and any(field.name == "budget" and field.init for field in fields(policy_class(name)))


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
