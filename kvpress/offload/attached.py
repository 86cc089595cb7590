"""What ties a cache to its tiers: the manager, the account of what stays near, and the working memory its layers take turns in."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer

from kvpress.errors import UnsupportedModelError
from kvpress.host_memory import give_back_freed
from kvpress.offload.account import SharedManager
from kvpress.offload.errors import TierClosedError, TierError, TierFullError
from kvpress.offload.manager import TierManager
from kvpress.offload.options import Offload
from kvpress.offload.transfer import CudaDevice, HostDevice
from kvpress.offload.working import Reading, WorkingMemory, read_all

if TYPE_CHECKING:
    from kvpress.offload.ledger import TierStatistics
    from kvpress.offload.stowage import Stowage

SPARE = 64  # one part in so many of working memory is for tokens to come
LEAST_FREED = 2 << 20  # bytes that a model let go, for which it is worth while to give memory back to the system


def make_manager(options: Offload, device: torch.device) -> TierManager:
    """The tiers for a model on `device`."""
    return TierManager(options, HostDevice() if device.type == "cpu" else CudaDevice(device))


class Attached:
    """The tiers of one cache.

    Args:
        options: what the user said.
        device: of the model.
        shared: the manager, where a copied cache relies on the same blocks.
    """

    def __init__(self, options: Offload, device: torch.device, shared: SharedManager | None = None) -> None:
        self.options = options
        self.device = device
        self.name = secrets.token_hex(16)
        self._shared = SharedManager(make_manager(options, device)) if shared is None else shared
        self.account = self._shared.join()
        self.stowages: dict[int, weakref.ref[Stowage]] = {}
        self._memories: list[WorkingMemory] = []
        self._aside = 0  # bytes held for a table that moves down
        self._lowering = False
        self._freed = 0  # bytes that the model let go since memory was last given back to the system
        self._close = weakref.finalize(self, self._shared.leave, self.name, self.account)

    @property
    def manager(self) -> TierManager:
        """The tiers, tidied up.

        Raises:
            TierClosedError: the cache was closed.
        """
        self.check_open()
        self._shared.tidy()
        return self._shared.manager

    @property
    def is_open(self) -> bool:
        """Whether the cache was not closed."""
        return self._close.alive

    def check_open(self) -> None:
        """Raise TierClosedError when the cache was closed."""
        if not self.is_open:
            raise TierClosedError("manager", "is closed: the cache was closed")

    def share(self) -> int | None:
        """Bytes of the near tier that each layer may take of which only some slots are read: what is left of working memory and of
        what other layers hold near, in equal parts. None without a limit."""
        near = self._shared.manager.near
        if near is None or near.ledger.limit is None:
            return None
        living = self._living()
        few = sum(stowage.reads_rows for stowage in living)
        others = sum(stowage.held for stowage in living if not stowage.reads_rows)
        taken = others + self._aside + sum(memory.nbytes for memory in self._memories)
        return max(near.ledger.limit - taken, 0) // max(few, 1)

    @property
    def keeps_near(self) -> bool:
        """Whether there is a limit under which tables may stay where the computation reads them."""
        return self._shared.manager.near is not None

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """For what is done to one layer after the other: when it fails, some have it behind them, and none serves until it is reset."""
        try:
            yield
        except TierError:
            for stowage in self._living():
                stowage.broken = True
            raise

    def close(self) -> None:
        """Free everything: memory, files, threads. Closing twice is no error."""
        for memory in self._memories:
            memory.forget()
        self._memories = []
        self._close()

    # -- the account ---------------------------------------------------------------------------------------------------

    def hold(self, nbytes: int, asking: Stowage | None) -> None:
        """Reserve `nbytes` near, moving blocks and, where that is not enough, other layers' tables down.

        Raises:
            TierFullError: they cannot be had.
        """
        if self.account.hold(nbytes):
            return
        self._shared.tidy()
        self._give_back_idle()
        for memory in [
            each
            for each in self._memories
            if each.future is not None and (asking is None or each.layer != asking.layer)
        ]:
            if self.account.hold(nbytes):
                return
            self._give_back(memory)  # read ahead in vain
        refused: list[TierFullError] = []
        for give_way in (self.lower, lambda each: each.cool()):
            if self._held_after(give_way, nbytes, asking, refused):
                return
        self.account.release(self._aside)  # nothing is left that could move down
        self._aside = 0
        if not self.account.hold(nbytes):
            tier = self.manager.near
            name, limit = ("near", None) if tier is None else (tier.name, tier.ledger.limit)
            raise TierFullError(
                name,
                f"has no room for {nbytes} bytes of working memory beside the {self.account.held} held, of {limit}: "
                "raise the limit, or use a smaller block",
            ) from (refused[-1] if refused else None)

    def hold_in_place_of_tables(self, nbytes: int, asking: Stowage) -> bool:
        """Reserve `nbytes` near, moving other layers' tables down, but at the cost of no near copies; False where that is not enough."""
        return self._held_after(self.lower, nbytes, asking, [])

    def _held_after(
        self,
        give_way: Callable[[Stowage], None],
        nbytes: int,
        asking: Stowage | None,
        refused: list[TierFullError],
    ) -> bool:
        """Reserve `nbytes` as soon as enough other layers gave way; notes those that could not."""
        # a layer that is read whole at every token is the last to move down
        others = sorted(self._living(), key=lambda each: (not each.reads_rows, -each.held))
        for other in others:
            if self.account.hold(nbytes):
                return True
            if other is not asking:
                try:
                    give_way(other)
                except TierFullError as error:  # this table stays where it is: another one may go
                    refused.append(error)
        return self.account.hold(nbytes)

    def lower(self, stowage: Stowage) -> None:
        """Move a table down. What it needs for a moment, its new tail beside its old buffers, was set aside for that."""
        if self._lowering:
            return
        self._lowering = True
        try:
            with self.aside_in_use():
                stowage.lower()
        finally:
            self._lowering = False

    @contextmanager
    def aside_in_use(self) -> Iterator[None]:
        """What was set aside may be taken meanwhile, and given back."""
        aside, self._aside = self._aside, 0
        self.account.release(aside)
        try:
            yield
        finally:
            self._aside += aside if self.account.hold(aside) else 0

    def set_aside(self, nbytes: int) -> None:
        """Keep `nbytes` for tables that move down, if that is possible."""
        if nbytes > self._aside and self.account.hold(nbytes - self._aside):
            self._aside = nbytes

    def _give_back_idle(self) -> None:
        for memory in [each for each in self._memories if each.layer == -1]:
            self._give_back(memory)

    def let_go(self, nbytes: int) -> None:
        """The model's own keys and values, of `nbytes`, were put away: they are free, and what was made on the way to them."""
        self._freed += nbytes
        if self._freed >= LEAST_FREED and self._shared.manager.computes_in_host_memory:
            self._freed = 0
            give_back_freed()

    # -- working memory ------------------------------------------------------------------------------------------------

    def borrow(self, layer: int, nbytes: int, staging: int, *, ahead: bool = False) -> WorkingMemory | None:
        """Working memory of at least `nbytes` for `layer`, with at least `staging` bytes for a block on its way.

        Args:
            ahead: for a layer whose turn is yet to come: None where memory is short, and nobody else's is taken.

        Raises:
            TierFullError: there is no room for it.
        """
        mine = next((memory for memory in self._memories if memory.layer == layer), None)
        if mine is None:
            mine = next((memory for memory in self._memories if memory.layer == -1), None)
        most = 1 + self.options.prefetch
        if mine is None and len(self._memories) >= most:
            if ahead:
                return None
            mine = self._memories[0]
        if mine is not None:
            mine.forget()
            if mine.buffer.nbytes < nbytes or mine.staging.nbytes < staging:
                self._give_back(mine)
                mine = None
        if mine is None:
            roomy = nbytes + nbytes // SPARE
            if ahead and not self.account.hold(roomy + staging):
                return None
            if not ahead:
                self.hold(roomy + staging, self._stowage(layer))
            mine = WorkingMemory(roomy, staging, torch.empty(0, device=self.device))
            self._memories.append(mine)
        mine.layer = layer
        return mine

    def _living(self) -> list[Stowage]:
        return [found for reference in self.stowages.values() if (found := reference()) is not None]

    def _stowage(self, layer: int) -> Stowage | None:
        reference = self.stowages.get(layer)
        return None if reference is None else reference()

    def lent_to(self, layer: int) -> WorkingMemory | None:
        """The working memory that the layer has now."""
        return next((memory for memory in self._memories if memory.layer == layer and memory.future is None), None)

    def _give_back(self, memory: WorkingMemory) -> None:
        memory.forget()
        self._memories.remove(memory)
        self.account.release(memory.nbytes)

    def read_ahead(self, layer: int) -> WorkingMemory | None:
        """The working memory into which the layer's blocks were, or are, read ahead; waits for the end of it.

        Raises:
            TierError: a block is lost.
        """
        memory = next((each for each in self._memories if each.layer == layer and each.future is not None), None)
        if memory is None or memory.future is None:
            return None
        future, memory.future = memory.future, None
        error = future.exception()
        if error is None:
            return memory
        memory.layer = -1
        if getattr(error, "lost", True):
            raise error
        return None  # a passing error: it is tried again

    def forget(self, layer: int) -> None:
        """What was read ahead for `layer` is out of date."""
        for memory in self._memories:
            if memory.layer == layer:
                memory.forget()

    def release(self, layer: int) -> None:
        """The attention of `layer` has ended."""
        for memory in self._memories:
            if memory.layer == layer and memory.future is None:
                memory.layer = -1

    def prefetch(self, layer: int) -> None:
        """Read the layers behind `layer` in the background."""
        order = sorted(self.stowages)
        place = order.index(layer)
        for ahead in range(1, min(self.options.prefetch, len(order) - 1) + 1):
            stowage = self._stowage(order[(place + ahead) % len(order)])
            if (
                stowage is None
                or not stowage.blocks
                or stowage.selecting
                or any(each.layer == stowage.layer for each in self._memories)
            ):
                continue
            if not self.manager.computes_in_host_memory:  # blocks come to the device tier on a stream of their own
                self.manager.prefetch([key for block in stowage.blocks for key in block.keys])
                continue
            prepared = stowage.readings_ahead()
            if prepared is not None:
                memory, readings = prepared
                job = _Job(self._shared.manager, readings, memory.staging)
                memory.future = self.manager.background(job)
                memory.future.add_done_callback(job.forget)

    # -- copies and facts ----------------------------------------------------------------------------------------------

    def fork(self) -> Attached:
        """The tiers of a copied cache, which relies on the same blocks. What lies near is there twice, so it may have to move down.

        Raises:
            TierFullError: there is no room for what stays near.
        """
        self._shared.tidy()
        stowages = self._living()
        copied = Attached(self.options, self.device, self._shared)
        try:
            for stowage in stowages:  # near copies are made anew, in both caches
                stowage.cool()
            if not copied.account.hold(sum(stowage.held for stowage in stowages)):
                self._give_back_idle()
                for stowage in stowages:
                    self.lower(stowage)
                copied.hold(sum(stowage.held for stowage in stowages), None)
            self.manager.share(self.name, copied.name)
        except BaseException:
            copied.close()
            raise
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        copied = memo[id(self)] = self.fork()
        return copied

    @property
    def nbytes(self) -> int:
        """Bytes in memory of working memory, and of the blocks that this cache relies on."""
        if not self._close.alive:
            return 0
        return sum(memory.nbytes for memory in self._memories) + self.manager.bytes_in_memory(self.name)

    def statistics(self) -> dict[str, TierStatistics]:
        """Counters of each tier, the nearest first; copied caches share them."""
        return self._shared.manager.statistics() if self._close.alive else {}


class _Job:
    """Reads blocks. It knows no cache, so that a cache is never freed by the thread that reads for it."""

    def __init__(self, manager: TierManager, readings: Sequence[Reading], staging: Tensor) -> None:
        self._arguments = manager, readings, staging

    def __call__(self) -> None:
        read_all(*self._arguments)

    def forget(self, _: Future[None]) -> None:
        """Let go of what it would read into: one that was cancelled stays in the queue until a thread comes to it."""
        del self._arguments


def attach(layers: Sequence[Any], options: Offload, device: torch.device) -> Attached:
    """Give the compressed layers of a new cache their tiers.

    Raises:
        TypeError: `options` is no `Offload`.
        UnsupportedModelError: a model whose layers share keys.
    """
    from kvpress.layer import PolicyLayer
    from kvpress.offload.stowage import Stowage

    if not isinstance(options, Offload):
        raise TypeError(f"offload must be an Offload or None, got {options!r}")
    if any(isinstance(layer, DummyLayer) for layer in layers):
        raise UnsupportedModelError("offload must be None for a model that shares keys between layers")
    attached = Attached(options, device)
    for layer in layers:
        if isinstance(layer, PolicyLayer):
            selector, together = layer.selector, None
            if selector is not None and selector.has_index and layer.reader is not None:
                together = layer.reader.shared and selector.one_set
            apart = selector is not None and together is None
            layer.stowage = Stowage(attached, layer.layer_idx, apart, together)
            layer.stowage.begin(layer.table)
    return attached
