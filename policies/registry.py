"""Names of policies. Each is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import MISSING, dataclass, fields
from typing import Any

from kvpress.policies.base import Policy

_POLICIES: dict[str, str | type[Policy]] = {  # name -> module:class, or the class
    "full": "kvpress.policies.full:Full",
    "streaming_llm": "kvpress.policies.streaming_llm:StreamingLLM",
    "snapkv": "kvpress.policies.snapkv:SnapKV",
    "pyramidkv": "kvpress.policies.pyramidkv:PyramidKV",
    "adakv": "kvpress.policies.adakv:AdaKV",
    "sepllm": "kvpress.policies.sepllm:SepLLM",
    "tova": "kvpress.policies.tova:TOVA",
    "h2o": "kvpress.policies.h2o:H2O",
    "keyformer": "kvpress.policies.keyformer:Keyformer",
    "morphkv": "kvpress.policies.morphkv:MorphKV",
    "knorm": "kvpress.policies.knorm:KNorm",
    "random": "kvpress.policies.random:Random",
    "tokenselect": "kvpress.policies.tokenselect:TokenSelect",
    "quest": "kvpress.policies.quest:Quest",
    "tidaldecode": "kvpress.policies.tidaldecode:TidalDecode",
}


@dataclass(frozen=True)
class Description:
    """One row of the table of policies."""

    name: str
    class_name: str
    kind: str
    summary: str
    paper: str
    needs: str
    parameters: dict[str, Any]  # name -> default, "required" where there is none


def register_policy(name: str, policy: type[Policy] | str) -> None:
    """Add a policy under `name`: its class, or `"module:Class"` to import it on demand.

    Raises:
        ValueError: a name that is taken by another class.
    """
    if _target(_POLICIES.get(name, policy)) != _target(policy):
        raise ValueError(f"policy name {name!r} is taken by {_target(_POLICIES[name])}")
    _POLICIES[name] = policy


def _target(policy: type[Policy] | str) -> str:
    return policy if isinstance(policy, str) else f"{policy.__module__}:{policy.__qualname__}"


def policy_names() -> list[str]:
    """All registered names, in the order of registration."""
    return list(_POLICIES)


def policy_class(name: str) -> type[Policy]:
    """The class registered under `name`.

    Raises:
        ValueError: an unknown name; the message suggests near ones.
    """
    if name not in _POLICIES:
        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), _POLICIES, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(repr(item) for item in near)}?" if near else ""
        raise ValueError(f"policy must be one of {policy_names()}, got {name!r}{hint}")
    registered = _POLICIES[name]
    if not isinstance(registered, str):
        return registered
    module, _, attribute = registered.partition(":")
    found: type[Policy] = getattr(importlib.import_module(module), attribute)
    return found


def make_policy(name: str, **parameters: Any) -> Policy:
    """An instance of the policy registered under `name`.

    Raises:
        ValueError: unknown name or parameter, or a value that breaks a rule.
    """
    found = policy_class(name)
    missing = [
        field.name
        for field in fields(found)
        if field.init and field.default is MISSING and field.default_factory is MISSING and field.name not in parameters
    ]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}, got {sorted(parameters) or 'no parameter'}")
    return found.from_dict(parameters)


def describe_policies() -> list[Description]:
    """One description per registered policy."""
    rows = []
    for name in policy_names():
        found = policy_class(name)
        given = [field for field in fields(found) if field.init]
        parameters = {field.name: "required" if field.default is MISSING else field.default for field in given}
        rows.append(Description(name, found.__name__, found.kind, found.summary, found.paper, found.needs, parameters))
    return rows
