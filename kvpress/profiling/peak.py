"""The highest memory of a stretch of a program: resident memory of the process, and CUDA memory."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import ClassVar, Protocol

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SAMPLING_SECONDS = 0.002


class HighWaterMark(Protocol):
    """A counter that something else keeps: memory now, the highest since the last `clear`, in bytes."""

    def now(self) -> int: ...

    def highest(self) -> int: ...

    def clear(self) -> None: ...


class ResidentMark:
    """The high-water mark of resident memory that Linux keeps for a process (`VmHWM` of proc(5), cleared through `clear_refs`).

    Clearing first gives free memory that the C library keeps back to the system: what an earlier phase freed is not the next one's.
    """

    def now(self) -> int:
        return resident_bytes()

    def highest(self) -> int:
        for line in _STATUS.read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise OSError(f"{_STATUS} has no line VmHWM")

    def clear(self) -> None:
        give_back_free_memory()
        _CLEAR.write_text("5", "ascii")


class CudaMark:
    """The high-water mark that torch keeps of a CUDA device's allocated memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def highest(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def clear(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def give_back_free_memory() -> None:
    """glibc's `malloc_trim`; nothing with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_mark() -> ResidentMark | None:
    """The system's own mark, or `None` where it keeps none that can be cleared."""
    mark = ResidentMark()
    try:
        mark.highest()
        with _CLEAR.open("a"):
            return mark
    except OSError:
        return None


class MarkedPeak:
    """Exact: clears the mark at the start and reads it at the end. Meters may nest and overlap, since a clearing shows every
    running meter of the same mark what it is about to forget.

    Args:
        mark: the counter.
        key: equal for counters of the same memory.
    """

    method = "exact"
    _running: ClassVar[list[MarkedPeak]] = []
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, mark: HighWaterMark, key: str) -> None:
        self.mark = mark
        self.key = key
        self.before = 0
        self.peak: int | None = None

    def start(self) -> None:
        with self._lock:
            seen = self.mark.highest()
            for meter in self._running:
                if meter.key == self.key:
                    meter.peak = max(meter.peak or 0, seen)
            self.mark.clear()
            self.peak = self.before = self.mark.now()
            self._running.append(self)

    def stop(self) -> None:
        with self._lock:
            self._running.remove(self)
            self.peak = max(self.peak or 0, self.mark.highest())


class SampledPeak:
    """Touches no counter: a thread looks at resident memory every 2 ms. Shorter peaks may be missed."""

    method = "sampled"

    def __init__(self) -> None:
        self.before = 0
        self.peak: int | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self.peak = self.before = resident_bytes()
        self._stopped.clear()
        self._thread = threading.Thread(target=self._watch, name="kvpress-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self.peak = max(self.peak or 0, resident_bytes())

    def _watch(self) -> None:
        while not self._stopped.wait(_SAMPLING_SECONDS):
            self.peak = max(self.peak or 0, resident_bytes())


class RaisedPeak:
    """Touches no counter: the mark at the end, where this stretch raised it, else `None`: its own peak is not known."""

    method = "raised"

    def __init__(self, mark: HighWaterMark) -> None:
        self.mark = mark
        self.before = 0
        self.peak: int | None = None
        self._earlier = 0

    def start(self) -> None:
        self.before, self._earlier, self.peak = self.mark.now(), self.mark.highest(), None

    def stop(self) -> None:
        highest = self.mark.highest()
        self.peak = highest if highest > self._earlier else None


Meter = MarkedPeak | SampledPeak | RaisedPeak


def resident_meter(exact: bool) -> Meter:
    """Of the process's resident memory; sampled where exactness is not asked for, or the system keeps no mark."""
    mark = resident_mark() if exact else None
    return SampledPeak() if mark is None else MarkedPeak(mark, "resident")


def cuda_meter(device: torch.device, exact: bool) -> Meter | None:
    """Of a CUDA device's allocated memory; `None` for another device."""
    if device.type != "cuda":
        return None
    mark = CudaMark(device)
    return MarkedPeak(mark, str(device)) if exact else RaisedPeak(mark)
