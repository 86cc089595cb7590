"""Policies: one method a file. Classes are imported when they are first named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpress.policies.base import EvictionPolicy, Policy
from kvpress.policies.registry import (
    _POLICIES,
    describe_policies,
    make_policy,
    policy_class,
    policy_names,
    register_policy,
)

if TYPE_CHECKING:
    from kvpress.policies.adakv import AdaKV
    from kvpress.policies.full import Full
    from kvpress.policies.h2o import H2O
    from kvpress.policies.keyformer import Keyformer
    from kvpress.policies.knorm import KNorm
    from kvpress.policies.morphkv import MorphKV
    from kvpress.policies.pyramidkv import PyramidKV
    from kvpress.policies.quest import Quest
    from kvpress.policies.random import Random
    from kvpress.policies.separators import separator_ids
    from kvpress.policies.sepllm import SepLLM
    from kvpress.policies.snapkv import SnapKV
    from kvpress.policies.streaming_llm import StreamingLLM
    from kvpress.policies.tidaldecode import TidalDecode
    from kvpress.policies.tokenselect import TokenSelect
    from kvpress.policies.tova import TOVA

__all__ = [
    "H2O",
    "TOVA",
    "AdaKV",
    "EvictionPolicy",
    "Full",
    "KNorm",
    "Keyformer",
    "MorphKV",
    "Policy",
    "PyramidKV",
    "Quest",
    "Random",
    "SepLLM",
    "SnapKV",
    "StreamingLLM",
    "TidalDecode",
    "TokenSelect",
    "describe_policies",
    "make_policy",
    "policy_class",
    "policy_names",
    "register_policy",
    "separator_ids",
]


def __getattr__(attribute: str) -> Any:
    if attribute == "separator_ids":
        from kvpress.policies.separators import separator_ids

        return separator_ids
    for name, target in _POLICIES.items():
        if isinstance(target, str) and target.endswith(f":{attribute}"):
            return policy_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
