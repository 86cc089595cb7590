"""A device with two streams that runs its work as late, or as early, as the recorded events allow.

Nothing put on a stream runs at once. The host makes it run by waiting for an event, and then only what that event
needs; or, when `eager` names a stream, that stream runs ahead of the other as far as its waits allow. A copy that lacks
a wait is thus certain to see bytes that are not there yet, or that are gone: freed buffers are overwritten with NaN.
"""

from collections import deque
from collections.abc import Callable
from threading import RLock

import torch
from torch import Tensor

POISON = 0xFF  # all ones is a NaN in float32, float16 and bfloat16


class FakeEvent:
    """Fires when its stream gets to it."""

    def __init__(self, stream: str) -> None:
        self.stream, self.fired = stream, False


Work = Callable[[], None] | tuple[str, FakeEvent]


class FakeDevice:
    """A `kvpress.offload.transfer.Device` in host memory.

    Args:
        eager: "compute" or "side" runs that stream ahead whenever it can; None leaves both as late as possible.

    Attributes:
        poisoned: freed buffers overwritten so far.
        delayed: pieces of work that did not run when they were put on their stream.
    """

    is_host = False

    def __init__(self, eager: str | None = None) -> None:
        if eager not in (None, "compute", "side"):
            raise ValueError(f"eager must be 'compute', 'side' or None, got {eager!r}")
        self._eager = eager
        self._lock = RLock()
        self._streams: dict[str, deque[Work]] = {"compute": deque(), "side": deque()}
        self.poisoned = 0
        self.delayed = 0

    def device_bytes(self, nbytes: int) -> int:
        return -(-nbytes // 512) * 512

    def host_bytes(self, nbytes: int) -> int:
        return 1 << max(nbytes - 1, 0).bit_length()

    def empty(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def empty_host(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def free(self, buffer: Tensor) -> None:
        self.launch(lambda: self._poison(buffer))

    def free_host(self, buffer: Tensor) -> None:
        self._poison(buffer)

    def launch(self, work: Callable[[], object]) -> None:
        """Put `work` on the computation stream, as a kernel would be."""
        self._put("compute", lambda: (work(), None)[1])

    def record_compute(self) -> FakeEvent:
        return self._record("compute")

    def record_side(self) -> FakeEvent:
        return self._record("side")

    def side_waits(self, event: FakeEvent) -> None:
        self._put("side", ("wait", event))

    def compute_waits(self, event: FakeEvent) -> None:
        self._put("compute", ("wait", event))

    def host_waits(self, event: FakeEvent) -> None:
        with self._lock:
            while not event.fired:
                self._run_one(event.stream)

    def side_copy(self, target: Tensor, source: Tensor) -> None:
        self._put("side", lambda: (target.copy_(source), None)[1])

    def synchronize(self) -> None:
        """Run all that is left, the eager stream first."""
        with self._lock:
            order = ("side", "compute") if self._eager == "side" else ("compute", "side")
            for stream in order:
                while self._streams[stream]:
                    self._run_one(stream)

    def _record(self, stream: str) -> FakeEvent:
        event = FakeEvent(stream)
        self._put(stream, ("record", event))
        return event

    def _put(self, stream: str, work: Work) -> None:
        with self._lock:
            self._streams[stream].append(work)
            self.delayed += stream != self._eager
            if self._eager is None:
                return
            queue = self._streams[self._eager]
            while queue:
                head = queue[0]
                if isinstance(head, tuple) and head[0] == "wait" and not head[1].fired:
                    return
                self._run_one(self._eager)

    def _run_one(self, stream: str) -> None:
        head = self._streams[stream][0]
        if isinstance(head, tuple):
            kind, event = head
            if kind == "wait":
                self.host_waits(event)
            else:
                event.fired = True
        else:
            head()
        self._streams[stream].popleft()

    def _poison(self, buffer: Tensor) -> None:
        self.poisoned += 1
        buffer.fill_(POISON)


class LaggingCopies(FakeDevice):
    """A device whose computation is the program itself, as torch runs it in host memory, and whose copies run only when waited for.

    A whole model can run on it: what the offload does for a device that does not compute in host memory is then tested with real layers.
    """

    def launch(self, work: Callable[[], object]) -> None:
        """Run `work` now."""
        work()

    def record_compute(self) -> FakeEvent:
        event = FakeEvent("compute")
        event.fired = True
        return event

    def compute_waits(self, event: FakeEvent) -> None:
        self.host_waits(event)
