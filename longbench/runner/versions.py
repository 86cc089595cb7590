"""Versions that a result depends on."""

import platform
from functools import cache
from importlib import metadata


@cache
def versions() -> dict[str, str]:
    """Python, this package, torch and transformers."""
    found = {"python": platform.python_version()}
    for name in ("kvpress-cache", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
