"""Bringing a block nearer: from disk or host memory into the nearest memory tier that takes it."""

from collections.abc import Mapping

from torch import Tensor

from kvpress.offload.block import Block
from kvpress.offload.errors import TierCorruptError, TierError, TierFullError, TierLostError
from kvpress.offload.mover import Attempt, Mover


class Loader:
    """Loads blocks through a `Mover`. Methods expect its lock to be held, and let it go while bytes move."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover

    def usable_tier(self, block: Block) -> str | None:
        """The tier whose copy the computation can read, if there is one."""
        if "device" in block.buffers:
            return "device"
        return "host" if self._mover.device.is_host and "host" in block.buffers else None

    def load(self, block: Block, attempt: Attempt) -> str | None:
        """Bring a busy block into the nearest tier with room and return the tier the computation can read, or None.

        Raises TierError when its copy cannot be read; a corrupt or vanished copy is then withdrawn.
        """
        mover = self._mover
        for tier in mover.memory_tiers:
            if tier.name in block.buffers:
                break
            if tier.name == "device" and "host" in mover.tiers and not mover.device.is_host:
                self._bring(block, "host", attempt)  # pinned host memory is the only way to the device
            if self._bring(block, tier.name, attempt):
                break
        return self.usable_tier(block)

    def _bring(self, block: Block, name: str, attempt: Attempt) -> bool:
        mover = self._mover
        if name in block.buffers:
            return True
        tier = mover.tiers[name]
        size = tier.size(block.key, block.layout)
        if not mover.reserve(name, size, attempt):
            attempt.causes.append(TierFullError(name, f"has no room for {size} bytes", block.key))
            return False
        source = next(iter(block.tiers))
        moves = mover.device.is_host and source != "disk"
        try:
            with mover.unlocked(stalls=mover.tiers[source]):
                buffer = block.buffers[source] if moves else self._fill(block, name)
        except TierError as error:
            tier.ledger.release(size)
            self.withdraw(block, error)
            raise
        mover.publish(block, name, buffer)
        if moves:
            mover.forget(block, source, keep_buffer=True)
        if source != "disk":
            mover.tiers[source].ledger.count(bytes_out=block.layout.nbytes)
        return True

    def _fill(self, block: Block, name: str) -> Tensor:
        mover = self._mover
        buffer = mover.new_buffer(name, block.layout.nbytes)
        try:
            if name == "host" or mover.device.is_host:
                mover.need_disk().read(block.key, block.layout, block.layout.views(buffer))
            elif "host" in block.buffers:
                mover.transfer.load(block.buffers["host"], buffer)
            else:
                with mover.staging(block) as staged:
                    mover.need_disk().read(block.key, block.layout, block.layout.views(staged))
                    mover.transfer.load(staged, buffer)
        except BaseException:
            mover.release_buffer(name, buffer)
            raise
        return buffer

    def read_into(self, block: Block, name: str, buffer: Tensor | None, out: Mapping[str, Tensor]) -> None:
        """Copy a pinned block from its `buffer` in tier `name`, or from disk. Called without the lock.

        Raises TierError; `out` is then undefined.
        """
        mover = self._mover
        if buffer is not None:
            if name == "device":
                mover.transfer.join(buffer)
                mover.device.launch(lambda: block.layout.copy_out(buffer, out))
            else:
                block.layout.copy_out(buffer, out)
            return
        in_place = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in out.values())
        if in_place:
            mover.need_disk().read(block.key, block.layout, out)
            return
        with mover.staging(block) as staged:
            mover.need_disk().read(block.key, block.layout, block.layout.views(staged))
            block.layout.copy_out(staged, out)

    def withdraw(self, block: Block, error: TierError) -> None:
        """Take a copy that turned out corrupt or vanished out of the disk tier; a passing error leaves it."""
        if isinstance(error, TierCorruptError | TierLostError) and block.on_disk:
            self._mover.forget(block, "disk")
