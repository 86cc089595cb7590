"""kvpress: a key-value cache that keeps, attends to and stores only what matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpress.cache import PolicyCache
    from kvpress.profiling import profile

__version__ = "0.1.0"
__all__ = ["PolicyCache", "__version__", "profile"]


def __getattr__(name: str) -> Any:
    if name == "PolicyCache":
        from kvpress.cache import PolicyCache

        return PolicyCache
    if name == "profile":
        from kvpress.profiling import profile

        return profile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
