"""What the manager knows of one block."""

from dataclasses import dataclass, field

from torch import Tensor

from kvpress.offload.errors import TierError
from kvpress.offload.key import BlockKey
from kvpress.offload.layout import BlockLayout


@dataclass(eq=False, slots=True)
class Block:
    """An immutable block and where its copies lie.

    Attributes:
        buffers: the flat uint8 copy in each memory tier that holds one.
        on_disk: whether the disk tier holds a copy.
        owners: the caches that rely on the block.
        pins: users of its tensors; while above 0 no copy is given up.
        moved_by: the thread that is moving it, if one is; everybody else waits.
        failure: what a prefetch met, kept for the caller who asks next.
        handle: of its file, where the disk tier keeps it open, else -1.
    """

    key: BlockKey
    layout: BlockLayout
    owners: set[str]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    on_disk: bool = False
    pins: int = 0
    moved_by: int | None = None
    failure: TierError | None = None
    handle: int = -1

    @property
    def busy(self) -> bool:
        """Whether a thread is moving the block."""
        return self.moved_by is not None

    @property
    def tiers(self) -> list[str]:
        """Names of the tiers that hold a copy."""
        return [*self.buffers, *(["disk"] if self.on_disk else [])]

    def holds(self, tier: str) -> bool:
        """Whether a copy lies in `tier`."""
        return self.on_disk if tier == "disk" else tier in self.buffers
