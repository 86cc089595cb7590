"""Memory and time: profiles, what fits, and decoding against the stock cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpress.profiling.context import Profile, profile

__all__ = ["Profile", "profile"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # torch waits until it is needed: the command's help needs none of it
        from kvpress.profiling import context

        return getattr(context, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
