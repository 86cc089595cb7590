"""Choice of an implementation: `"auto"` picks the first that can serve and says once which; an explicit name never
falls back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger("kvpress.kernels")
_announced: set[tuple[str, str]] = set()

Refusal = str | None  # why an implementation cannot serve these arguments; None = it can


def announced(operation: str, name: str) -> bool:
    """Whether `choose` has already said that it picks `name` for `operation`."""
    return (operation, name) in _announced


def choose(operation: str, impl: str, refusals: Mapping[str, Callable[[], Refusal]]) -> str:
    """Return the implementation of `operation` to call.

    Args:
        operation: its name, for messages.
        impl: `"auto"` or one of the names in `refusals`.
        refusals: implementations in order of preference; each value tells why it cannot serve, or `None`.

    Raises:
        ValueError: unknown `impl`, or an explicit `impl` that cannot serve these arguments.
    """
    if impl != "auto":
        if impl not in refusals:
            raise ValueError(f"impl of {operation} must be 'auto' or one of {sorted(refusals)}, got {impl!r}")
        reason = refusals[impl]()
        if reason is not None:
            raise ValueError(f"impl={impl!r} of {operation} cannot be used: {reason}")
        return impl
    for name, refusal in refusals.items():
        if refusal() is None:
            if (operation, name) not in _announced:
                _announced.add((operation, name))
                logger.info("%s runs on the %s implementation", operation, name)
            return name
    raise ValueError(f"no implementation of {operation} can serve these arguments")
