"""Errors that are more than a wrong argument."""

from __future__ import annotations


class KVPressError(Exception):
    """Base of this package's own errors."""


class UnsupportedModelError(KVPressError, ValueError):
    """A model that this cache cannot serve rightly."""


class MissingTokenIdsError(KVPressError, ValueError):
    """A forward without token ids, where the cache's policy needs them."""


class CacheStateError(KVPressError, RuntimeError):
    """A cache used in a way that its state does not allow."""


class CacheFormatError(KVPressError, ValueError):
    """A saved cache that is damaged, of another format, or of another model."""
