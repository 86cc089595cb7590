"""The one error of loading: what was asked for, which step failed, and what to do about it."""

from kvpress.errors import KVPressError


class ModelLoadError(KVPressError, RuntimeError):
    """A model could not be fetched, converted or read. The message names the model and the failed step."""
