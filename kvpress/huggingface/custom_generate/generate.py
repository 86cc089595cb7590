"""`generate` with a policy: transformers copies this file and calls the function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvpress import PolicyCache
from kvpress.cache_argument import NAMES, found, passed
from kvpress.policies.base import Policy
from kvpress.policy_config import PolicyConfig


def generate(
    model: Any, policy: Policy | str | Mapping[str, Any] | Sequence[Policy] | None = None, **arguments: Any
) -> Any:
    """As `model.generate`, with a fresh `PolicyCache`.

    Args:
        policy: what `PolicyCache` takes, or the dictionary of a `PolicyConfig`. The parameters of a policy given by name stand
            beside it: `policy="snapkv", budget=1024`, and `kv_dtype` of the cache.
        arguments: of `model.generate`.

    Returns:
        What `model.generate` returns; with `return_dict_in_generate=True` the cache among it.

    Raises:
        ValueError: no policy, a cache beside it, a parameter that is a setting of `generate` too, or what `PolicyCache` refuses.
    """
    if policy is None:
        raise ValueError("policy must be given: a registered name with its parameters, a policy, or a list of policies")
    if found(arguments) is not None:
        raise ValueError("cache (past_key_values) must be left out where a policy is given: it gets a fresh cache")
    parameters: dict[str, Any] = {}
    if isinstance(policy, str):
        parameters = _take_parameters(policy, model.generation_config, arguments)
    elif isinstance(policy, Mapping):
        policy = list(PolicyConfig.from_dict(policy).policies)
    cache = PolicyCache(model, policy, **parameters)
    for name in NAMES:
        arguments.pop(name, None)
    return model.generate(**arguments, **passed(model, cache))


def _take_parameters(name: str, settings: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the policy's parameters out of `arguments`."""
    from dataclasses import fields

    from kvpress.policies.registry import policy_class

    kind = policy_class(name)
    names = [*(field.name for field in fields(kind) if field.init), "kv_dtype"]
    given = [key for key in names if arguments.get(key) is not None]
    for key in given:
        if hasattr(settings, key):
            raise ValueError(
                f"{key} is a setting of generate and a parameter of {name}: pass an instance, policy={kind.__name__}({key}=…)"
            )
    return {key: arguments.pop(key) for key in given}
