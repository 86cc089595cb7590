"""Typed errors of the evaluation, and the import of optional libraries."""

import importlib
from types import ModuleType


class DataError(ValueError):
    """A benchmark file cannot be used; the message names the file, the line and the rule that was broken."""


class MissingExtraError(ImportError):
    """An optional library is needed; the message names the extra that installs it."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or say which extra of this project brings it.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the library {module.partition('.')[0]!r}: pip install 'kvpress-cache[{extra}]'"
        ) from error
