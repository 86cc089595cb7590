"""One measurement, as it is handed to a fresh process: JSON in, JSON out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvpress.policies.base import Policy


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        model: as `kvpress.models.load_model` takes it.
        label: name in results.
        policy: `described_policy` of a policy, `None` for the stock cache.
        kv_dtype: how the policy's cache stores keys and values.
        offload: arguments of the policy's cache's `Offload`, `None` for none.
        context: tokens of the prompt of each row.
        batch: rows.
        new_tokens: tokens to generate, the first one comes from the prompt; at least 2.
        dtype, device, threads: as on the command line, `None` for the defaults.
        chunk_size: tokens of one forward of the prompt, `None` for all.
        seed: of the text.
        cuda_snapshot: file to write, `None` for none.
    """

    model: str
    label: str
    policy: dict[str, Any] | None
    context: int
    batch: int = 1
    new_tokens: int = 32
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    chunk_size: int | None = None
    seed: int = 0
    cuda_snapshot: str | None = None
    kv_dtype: str | None = None
    offload: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field that a job does not have.
        """
        known = {field.name for field in fields(cls)}
        for name in data:
            if name not in known:
                raise ValueError(f"a job has no field {name!r}; it has {sorted(known)}")
        return cls(**data)


def described_policy(policy: Policy) -> dict[str, Any]:
    """A policy's parameters, and where its class is: another process then finds policies that were registered in this one.

    Raises:
        ValueError: a class that no other process can import.
    """
    kind = type(policy)
    if kind.__module__ == "__main__" or "<" in kind.__qualname__:
        raise ValueError(
            f"policy {kind.name!r} must be of a class that can be imported, to be measured in a fresh process, "
            f"got {kind.__module__}.{kind.__qualname__}"
        )
    return {"class": f"{kind.__module__}:{kind.__qualname__}", **policy.to_dict()}


def policy_from(description: Mapping[str, Any]) -> Policy:
    """The inverse of `described_policy`.

    Raises:
        TypeError: the name is not that of a policy class.
    """
    given = dict(description)
    module, _, attribute = str(given.pop("class")).partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not isinstance(found, type) or not issubclass(found, Policy):
        raise TypeError(f"class of a policy must be a Policy, got {module}:{attribute}")
    return found.from_dict(given)
