"""Copies between device memory and host memory on a side stream, with an event before and after each one.

Five orders must hold, and each has one line below that keeps it:
- a store reads a block only after the computation has written it (computation -> side stream);
- the host reads a stored copy, or gives the source back, only after the copy has run (side stream -> host);
- a load writes into memory only after the computation has read what lay there before (computation -> side stream);
- the computation reads a loaded block, or reuses its memory, only after the copy has run (side stream -> computation);
- the host gives the source of a load back only after the copy has run (side stream -> host).
"""

from collections.abc import Callable
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpress.host_memory import empty_pages, page_bytes

Event = Any  # torch.cuda.Event, or what a fake device records


class Device(Protocol):
    """What the tiers need of the device that computes. Buffers are flat uint8 tensors."""

    is_host: bool  # the device computes in host memory, so a block moves between the two without a copy

    def device_bytes(self, nbytes: int) -> int:
        """Bytes the allocator takes for a device buffer of `nbytes`."""

    def host_bytes(self, nbytes: int) -> int:
        """Bytes the allocator takes for a host buffer of `nbytes`."""

    def empty(self, nbytes: int) -> Tensor:
        """A new device buffer, ordered with the computation stream."""

    def empty_host(self, nbytes: int) -> Tensor:
        """A new host buffer the device can copy from and to."""

    def free(self, buffer: Tensor) -> None:
        """The device buffer may be reused by whatever is put on the computation stream from now on."""

    def free_host(self, buffer: Tensor) -> None:
        """The host buffer may be reused by the host at once."""

    def launch(self, work: Callable[[], object]) -> None:
        """Run `work` on the computation stream, after what the caller has queued and before what it will."""

    def record_compute(self) -> Event:
        """An event that fires when all that is on the computation stream now has run."""

    def record_side(self) -> Event:
        """An event that fires when all that is on the side stream now has run."""

    def side_waits(self, event: Event) -> None:
        """What is put on the side stream from now on runs after `event`."""

    def compute_waits(self, event: Event) -> None:
        """What is put on the computation stream from now on runs after `event`."""

    def host_waits(self, event: Event) -> None:
        """Return when `event` has fired."""

    def side_copy(self, target: Tensor, source: Tensor) -> None:
        """Put a copy on the side stream."""


class HostDevice:
    """The device when there is no GPU: the computation runs in host memory, in the order of the program."""

    is_host = True

    def device_bytes(self, nbytes: int) -> int:
        return page_bytes(nbytes)

    def host_bytes(self, nbytes: int) -> int:
        return page_bytes(nbytes)

    def empty(self, nbytes: int) -> Tensor:
        return empty_pages(nbytes)

    def empty_host(self, nbytes: int) -> Tensor:
        return empty_pages(nbytes)

    def free(self, buffer: Tensor) -> None:
        pass

    def free_host(self, buffer: Tensor) -> None:
        pass

    def launch(self, work: Callable[[], object]) -> None:
        work()

    def record_compute(self) -> Event:
        return None

    def record_side(self) -> Event:
        return None

    def side_waits(self, event: Event) -> None:
        pass

    def compute_waits(self, event: Event) -> None:
        pass

    def host_waits(self, event: Event) -> None:
        pass

    def side_copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)


class CudaDevice:
    """A CUDA device. The stream current at construction is the one that computes, and reads what `get` returns."""

    is_host = False

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)
        if self._device.type != "cuda" or not torch.cuda.is_available():
            raise ValueError(f"device must be an available CUDA device, got {device!r}")
        self._compute = torch.cuda.current_stream(self._device)
        self._side = torch.cuda.Stream(self._device)

    def device_bytes(self, nbytes: int) -> int:
        return -(-nbytes // 512) * 512  # the caching allocator's smallest unit

    def host_bytes(self, nbytes: int) -> int:
        return 1 << max(nbytes - 1, 0).bit_length()  # the pinned allocator rounds up to a power of two

    def empty(self, nbytes: int) -> Tensor:
        with torch.cuda.stream(self._compute):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def empty_host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def free(self, buffer: Tensor) -> None:
        pass  # the last reference frees it, and the allocator reuses it in the order of the computation stream

    def free_host(self, buffer: Tensor) -> None:
        pass

    def launch(self, work: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._compute.wait_stream(current)
        with torch.cuda.stream(self._compute):
            work()
        current.wait_stream(self._compute)

    def record_compute(self) -> Event:
        return self._compute.record_event()

    def record_side(self) -> Event:
        return self._side.record_event()

    def side_waits(self, event: Event) -> None:
        self._side.wait_event(event)

    def compute_waits(self, event: Event) -> None:
        self._compute.wait_event(event)

    def host_waits(self, event: Event) -> None:
        event.synchronize()

    def side_copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)


class Transfer:
    """Stores and loads in the right order. Each wait is a method of its own, so that a test can drop it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = Lock()
        self._copies_from_host: dict[int, Event] = {}
        self._copies_to_device: dict[int, Event] = {}

    def store(self, source: Tensor, target: Tensor) -> None:
        """Copy a device buffer into a host buffer; returns when the host may read it."""
        self._source_is_written()
        self._device.side_copy(target, source)
        self._store_is_done(self._device.record_side())

    def load(self, source: Tensor, target: Tensor) -> None:
        """Start to copy a host buffer into a device buffer. Call `join` before the computation reads it."""
        self._target_is_unused()
        self._device.side_copy(target, source)
        event = self._device.record_side()
        with self._lock:
            self._copies_from_host[source.data_ptr()] = event
            self._copies_to_device[target.data_ptr()] = event

    def join(self, buffer: Tensor) -> None:
        """What is put on the computation stream from now on sees the loaded bytes of `buffer`."""
        with self._lock:
            event = self._copies_to_device.get(buffer.data_ptr())
        if event is not None:
            self._load_is_joined(event)

    def free(self, buffer: Tensor) -> None:
        """Give a device buffer back in the order of the computation stream."""
        self.join(buffer)
        with self._lock:
            self._copies_to_device.pop(buffer.data_ptr(), None)
        self._device.free(buffer)

    def free_host(self, buffer: Tensor) -> None:
        """Give a host buffer back once no copy reads it."""
        with self._lock:
            event = self._copies_from_host.pop(buffer.data_ptr(), None)
        if event is not None:
            self._load_is_done(event)
        self._device.free_host(buffer)

    def _source_is_written(self) -> None:
        self._device.side_waits(self._device.record_compute())

    def _store_is_done(self, event: Event) -> None:
        self._device.host_waits(event)

    def _target_is_unused(self) -> None:
        self._device.side_waits(self._device.record_compute())

    def _load_is_joined(self, event: Event) -> None:
        self._device.compute_waits(event)

    def _load_is_done(self, event: Event) -> None:
        self._device.host_waits(event)
