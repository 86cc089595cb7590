"""Typed errors of the storage tiers. Each one says what was lost, if anything was."""

from kvpress.errors import KVPressError


class TierError(KVPressError, RuntimeError):
    """A storage tier could not do what was asked.

    Attributes:
        tier: "device", "host" or "disk".
        key: description of the block concerned, or None when no single block is.
        reason: what happened.
        lost: True when the only copy of the block is gone and the cache can no longer be exact.
    """

    lost = False

    def __init__(self, tier: str, reason: str, key: object = None) -> None:
        self.tier, self.reason, self.key = tier, reason, key
        block = "" if key is None else f", block {key}"
        ending = "; the block is lost" if self.lost else ""
        super().__init__(f"{tier} tier{block}: {reason}{ending}")


class TierFullError(TierError):
    """No tier that may hold the block has room for it. Nothing was lost: the caller still holds the data."""


class TierWriteError(TierError):
    """A block could not be written. It is not visible in the tier, and stays where it was before."""


class TierReadError(TierError):
    """A block could not be read, twice, for a reason that may pass. It is kept."""


class TierCorruptError(TierError):
    """A stored block is not what was written: flipped, cut, foreign or of another version. It was removed."""

    lost = True


class TierLostError(TierError):
    """A stored block has vanished, or was never there although the caller relies on it."""

    lost = True


class TierClosedError(TierError):
    """The manager was closed, or belongs to the process this one was forked from."""
