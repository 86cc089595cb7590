"""What an eviction policy does with a decoded token, where that is simple enough for one compiled call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpress.policies.base import EvictionPolicy

# what a rule speaks for: a subclass that changes one of these no longer does what its parent's rule says
_SPOKEN_FOR = ("observe", "score", "discards", "weights_reduction")


@dataclass(frozen=True)
class TokenRule:
    """`observe` does `columns[column] = fade * columns[column] + observation.weights`, and `score` gives that column.

    Args:
        column: the policy's only one; `None`: it has none, and `score` gives positions, so that the oldest token goes.
        fade: factor of the column at each decoded token.
    """

    column: str | None
    fade: float = 1.0


def token_rule(policy: EvictionPolicy) -> TokenRule | None:
    """The `token_rule` of a policy; `None` where it has none, or a subclass does something else than the class whose rule it is."""
    for kind in type(policy).__mro__:
        if "token_rule" in vars(kind):
            return policy.token_rule
        if any(name in vars(kind) for name in _SPOKEN_FOR):
            return None
    return None
