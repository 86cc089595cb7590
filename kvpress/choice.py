"""From what a user passes to the policies of a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvpress.assembly import Policies
from kvpress.policies.base import EvictionPolicy, Policy
from kvpress.policies.full import Full
from kvpress.policies.registry import make_policy
from kvpress.policies.selection import SelectionPolicy


def choose_policies(policy: Policy | str | Sequence[Policy], parameters: Mapping[str, Any]) -> Policies:
    """The eviction policy (`Full` where none is named) and the selection policy, if any, that `policy` names.

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
    selections = [item for item in chosen if isinstance(item, SelectionPolicy)]
    for kind, found in (("eviction", evictions), ("selection", selections)):
        if len(found) > 1:
            raise ValueError(f"a cache takes at most one {kind} policy, got {[item.name for item in found]}")
    eviction = evictions[0] if evictions else Full()
    selection = selections[0] if selections else None
    if selection is not None and selection.same_slots_in_all_layers and not eviction.layers_agree:
        raise ValueError(
            f"{selection.name} lets layers attend to what another layer chose, which needs the same tokens in all layers: "
            f"it does not go with {eviction.name}"
        )
    if eviction.reindexes and selection is not None and not selection.reindexes:
        raise ValueError(
            f"{selection.name} selects by keys as the model rotates them, which positions='reindex' of {eviction.name} does not store"
        )
    return Policies(eviction, selection)
