"""From what a user passes to the policies of a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvpress.policies.base import EvictionPolicy, Policy
from kvpress.policies.registry import make_policy


def choose_policies(policy: Policy | str | Sequence[Policy], parameters: Mapping[str, Any]) -> EvictionPolicy:
    """The eviction policy named by `policy`.

    Args:
        policy: an instance, a registered name, or a list of instances.
        parameters: of a policy given by name.

    Raises:
        ValueError: an unknown name or parameter, parameters beside an instance, or more than one policy of a kind.
    """
    if isinstance(policy, str):
        policy = make_policy(policy, **parameters)
    elif parameters:
        raise ValueError(f"parameters {sorted(parameters)} go with a policy's name; {policy!r} has its own")
    chosen = [policy] if isinstance(policy, Policy) else policy
    if not isinstance(chosen, Sequence) or not all(isinstance(item, Policy) for item in chosen) or not chosen:
        raise ValueError(f"policy must be a policy, its registered name or a list of policies, got {policy!r}")
    evictions = [item for item in chosen if isinstance(item, EvictionPolicy)]
    if len(evictions) != 1 or len(chosen) != 1:
        raise ValueError(f"a cache takes at most one eviction policy, got {[item.name for item in chosen]}")
    return evictions[0]
