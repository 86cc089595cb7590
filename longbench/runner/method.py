"""What is compared: a policy at a budget, or the full cache."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel

# Makes a fresh cache for a model; None stands for the model's own full cache.
CacheFactory = Callable[[PreTrainedModel], Cache | None]
Budget = int | float | str | None


@dataclass(frozen=True)
class Method:
    """A cache to evaluate: by policy name and budget, or by a factory of one's own.

    Attributes:
        policy: name of a registered policy, or "full" for the model's own cache.
        budget: tokens (int), share of the prompt (float in (0, 1]) or bytes (text such as "256MB").
        options: further parameters of the policy, and `kv_dtype` of its cache.
        offload: arguments of the `kvpress.offload.Offload` of its cache; None for none.
        factory: makes the cache instead of `kvpress.PolicyCache`; `policy` and `budget` then only name it.
    """

    policy: str
    budget: Budget = None
    options: Mapping[str, Any] = field(default_factory=dict)
    offload: Mapping[str, Any] | None = None
    factory: CacheFactory | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        """Name in results: "snapkv@0.25", "full"."""
        extra = [f"{name}={value}" for name, value in sorted(self.options.items())]
        extra += [] if self.offload is None else ["offload"]
        budget = "" if self.budget is None else f"@{self.budget}"
        return self.policy + budget + (f"[{','.join(extra)}]" if extra else "")

    def make_cache(self, model: PreTrainedModel) -> Cache:
        """A fresh cache for one prompt on `model`.

        Raises:
            ValueError: the policy or its budget is refused by the cache.
            TierError: a tier that cannot be had.
        """
        cache = self.factory(model) if self.factory is not None else self._policy_cache(model)
        return DynamicCache(config=model.config) if cache is None else cache

    def _policy_cache(self, model: PreTrainedModel) -> Cache | None:
        if self.policy == "full" and not self.options and self.offload is None:
            return None
        from kvpress import PolicyCache
        from kvpress.offload import Offload

        options = dict(self.options)
        if self.offload is not None:
            options["offload"] = Offload(**self.offload)
        if self.budget is not None:
            options["budget"] = self.budget
        cache: Cache = PolicyCache(model, self.policy, **options)
        return cache


FULL = Method("full")


def methods_of(policies: Iterable[str], budgets: Iterable[Budget], *, full: bool = True) -> list[Method]:
    """Every policy at every budget (without budgets, each once), after the full cache unless `full` is False."""
    chosen = list(budgets) or [None]
    named = [Method(policy, budget) for policy in policies if policy != "full" for budget in chosen]
    return [FULL, *named] if full or not named else named
