"""Blocks of a cache in device memory, host memory and files, under byte limits."""

from kvpress.offload.errors import (
    TierClosedError,
    TierCorruptError,
    TierError,
    TierFullError,
    TierLostError,
    TierReadError,
    TierWriteError,
)
from kvpress.offload.key import BlockKey
from kvpress.offload.layout import BlockLayout
from kvpress.offload.ledger import TierStatistics
from kvpress.offload.manager import TierManager
from kvpress.offload.options import Offload

__all__ = [
    "BlockKey",
    "BlockLayout",
    "Offload",
    "TierClosedError",
    "TierCorruptError",
    "TierError",
    "TierFullError",
    "TierLostError",
    "TierManager",
    "TierReadError",
    "TierStatistics",
    "TierWriteError",
]
