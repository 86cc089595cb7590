"""kvpress: a key-value cache that keeps, attends to and stores only what matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpress.cache import PolicyCache

__version__ = "0.1.0"
__all__ = ["PolicyCache", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "PolicyCache":
        from kvpress.cache import PolicyCache

        return PolicyCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
