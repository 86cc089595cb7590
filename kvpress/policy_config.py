"""Policies as a configuration file beside a model, in the manner of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from kvpress.choice import choose_policies
from kvpress.errors import CacheFormatError
from kvpress.policies.base import Policy
from kvpress.policies.registry import policy_class


@dataclass(frozen=True)
class PolicyConfig:
    """The policies of a cache, to be kept as JSON: `save_pretrained` writes `policy_config.json`, `from_pretrained` reads it.

    Attributes:
        policies: at most one eviction and one selection policy, as `PolicyCache` takes them.

    Raises:
        ValueError: no policy, or two of a kind.

    Example:
        PolicyConfig.of("snapkv", budget=1024).save_pretrained("my-model")
        cache = PolicyCache(model, PolicyConfig.from_pretrained("my-model").policies)
    """

    policies: tuple[Policy, ...]

    FILE: ClassVar[str] = "policy_config.json"
    TYPE: ClassVar[str] = "kvpress_policies"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        choose_policies(self.policies, {})

    @classmethod
    def of(cls, policy: Policy | str | Sequence[Policy], **parameters: Any) -> Self:
        """What `PolicyCache(model, policy, **parameters)` would use, `full` aside where only a selection is named.

        Raises:
            ValueError: as `PolicyCache`.
        """
        if isinstance(policy, Sequence) and not isinstance(policy, str):
            return cls(tuple(policy))
        chosen = choose_policies(policy, parameters)
        return cls((chosen.eviction if chosen.selection is None else chosen.selection,))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with `_type` and `_version`."""
        return {
            "_type": self.TYPE,
            "_version": self.VERSION,
            "policies": [json.loads(json.dumps(policy.to_dict())) for policy in self.policies],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            CacheFormatError: another type or version, or damaged; names the field.
            ValueError: an unknown policy, or a parameter that it refuses.
        """
        for field, expected in (("_type", cls.TYPE), ("_version", cls.VERSION)):
            found = data.get(field)
            if found != expected or isinstance(found, bool):
                raise CacheFormatError(f"{field} of a policy configuration must be {expected!r}, got {found!r}")
        given = data.get("policies")
        if not isinstance(given, list) or not all(
            isinstance(item, dict) and isinstance(item.get("name"), str) for item in given
        ):
            raise CacheFormatError(
                f"policies of a policy configuration must be a list of policies with names, got {given!r}"
            )
        try:
            return cls(tuple(policy_class(item["name"]).from_dict(item) for item in given))
        except TypeError as error:
            raise CacheFormatError(f"policies of a policy configuration: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `policy_config.json` into `folder`, which is made if it is not there."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (target / self.FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> Self:
        """Read `policy_config.json` of a local folder or of a hub repository.

        Args:
            hub: arguments of transformers' `cached_file`, such as `revision`, `token` or `local_files_only`.

        Raises:
            OSError: there is no such file.
            CacheFormatError: it is damaged, of another type or of another version.
            ValueError: an unknown policy, or a parameter that it refuses.
        """
        from transformers.utils.hub import cached_file

        path = cached_file(str(name_or_path), cls.FILE, **hub)
        if path is None:
            raise OSError(f"{cls.FILE} is missing in {str(name_or_path)!r}")
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CacheFormatError(f"{cls.FILE} of {str(name_or_path)!r} is damaged: {error}") from error
        if not isinstance(data, dict):
            raise CacheFormatError(
                f"{cls.FILE} of {str(name_or_path)!r} must hold an object, got {type(data).__name__}"
            )
        return cls.from_dict(data)
