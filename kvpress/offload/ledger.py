"""The byte account of one tier: what is reserved never exceeds the limit, not even for a moment."""

from dataclasses import dataclass, replace
from threading import Lock


@dataclass
class TierStatistics:
    """Counters of one tier. Bytes include what is being written or copied right now.

    Attributes:
        limit: bytes the tier may hold, or None.
        bytes, peak_bytes, blocks: what it holds now, the most bytes it ever held, and the blocks it holds now.
        hits: requests served from this tier.
        misses: requests this tier could not serve although it was asked.
        bytes_in, bytes_out: bytes moved into the tier and read from it.
        stall_seconds: time callers waited for this tier's copies, reads and writes.
        failures: reads and writes that ended in an error.
    """

    limit: int | None = None
    bytes: int = 0
    peak_bytes: int = 0
    blocks: int = 0
    hits: int = 0
    misses: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    stall_seconds: float = 0.0
    failures: int = 0


class Ledger:
    """Reserve before allocating or writing; release after freeing or unlinking. Thread safe."""

    def __init__(self, limit: int | None) -> None:
        self._lock = Lock()
        self._counters = TierStatistics(limit=limit)

    @property
    def limit(self) -> int | None:
        return self._counters.limit

    def reserve(self, nbytes: int) -> bool:
        """Take `nbytes`, or return False and take nothing when the limit would be passed."""
        with self._lock:
            counters = self._counters
            if counters.limit is not None and counters.bytes + nbytes > counters.limit:
                return False
            counters.bytes += nbytes
            counters.peak_bytes = max(counters.peak_bytes, counters.bytes)
            return True

    def release(self, nbytes: int) -> None:
        """Give `nbytes` back."""
        with self._lock:
            self._counters.bytes -= nbytes

    def count(self, **increments: float) -> None:
        """Add to the counters named."""
        with self._lock:
            for name, value in increments.items():
                setattr(self._counters, name, getattr(self._counters, name) + value)

    def statistics(self) -> TierStatistics:
        """A copy of the counters."""
        with self._lock:
            return replace(self._counters)
