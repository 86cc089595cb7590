"""A memory tier: an account of flat buffers. Device and host memory are each one."""

from collections.abc import Callable

from kvpress.offload.key import BlockKey
from kvpress.offload.layout import BlockLayout
from kvpress.offload.ledger import Ledger


class MemoryTier:
    """Bytes of memory under a limit.

    Args:
        name: "device" or "host".
        limit: bytes its buffers may take together.
        rounded: what the allocator really takes for a buffer of so many bytes.
    """

    def __init__(self, name: str, limit: int, rounded: Callable[[int], int]) -> None:
        self.name = name
        self.ledger = Ledger(limit)
        self._rounded = rounded

    def size(self, key: BlockKey, layout: BlockLayout) -> int:
        """Bytes the block takes in this tier, the allocator's rounding included."""
        return self._rounded(layout.nbytes)
