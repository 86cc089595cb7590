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
    """The `token_rule` of a policy; `None` where it has none, or a subclass does something else than the class whose rule it is.

    Raises:
        ValueError: a rule for other columns than the policy's, without weights to add, or beside recent queries, which nobody would note.
    """
    rule = None
    for kind in type(policy).__mro__:
        if "token_rule" in vars(kind):
            rule = policy.token_rule
            break
        if any(name in vars(kind) for name in _SPOKEN_FOR):
            return None
    if rule is None:
        return None
    columns = () if rule.column is None else (rule.column,)
    if policy.columns != columns:
        raise ValueError(f"token_rule of {policy.name} must be for its columns {policy.columns}, got {columns}")
    if columns and policy.weights_reduction is None:
        raise ValueError(
            f"token_rule of {policy.name} adds weights to {rule.column!r}: weights_reduction must not be None"
        )
    if policy.recent_queries or policy.needs_token_ids:
        raise ValueError(
            f"token_rule of {policy.name} must be None for a policy that needs recent queries or token ids"
        )
    return rule
