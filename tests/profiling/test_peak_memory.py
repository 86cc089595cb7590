"""Peaks of memory: exact where the system keeps a mark, sampled elsewhere, and meters that do not disturb each other."""

import pytest
import torch

from kvpress.profiling import peak
from kvpress.profiling.peak import MarkedPeak, RaisedPeak, SampledPeak, cuda_meter, resident_mark, resident_meter

MEGABYTE = 10**6


def touch(megabytes: int) -> None:
    """Hold so much memory for a moment."""
    torch.ones(megabytes * MEGABYTE // 4).sum().item()


class FakeMark:
    """A counter that the test moves."""

    def __init__(self) -> None:
        self.level = self.top = 100
        self.clearings = 0

    def go(self, level: int) -> None:
        self.level = level
        self.top = max(self.top, level)

    def now(self) -> int:
        return self.level

    def highest(self) -> int:
        return self.top

    def clear(self) -> None:
        self.top = self.level
        self.clearings += 1


@pytest.mark.skipif(resident_mark() is None, reason="this system keeps no high-water mark that can be cleared")
def test_a_short_peak_is_seen_exactly_and_forgotten_by_the_next_meter() -> None:
    first = resident_meter(exact=True)
    first.start()
    touch(120)
    first.stop()
    second = resident_meter(exact=True)
    second.start()
    touch(20)
    second.stop()
    assert first.method == second.method == "exact"
    assert first.peak is not None and second.peak is not None
    assert 110 * MEGABYTE < first.peak - first.before < 180 * MEGABYTE
    assert second.peak - second.before < 60 * MEGABYTE


def test_an_inner_meter_does_not_hide_a_peak_from_the_outer_one() -> None:
    mark = FakeMark()
    outer, inner, other = MarkedPeak(mark, "host"), MarkedPeak(mark, "host"), MarkedPeak(FakeMark(), "elsewhere")
    outer.start()
    other.start()
    mark.go(500)
    mark.go(200)
    inner.start()  # clears the mark, which stood at 500
    mark.go(300)
    mark.go(250)
    inner.stop()
    outer.stop()
    other.stop()
    assert mark.clearings == 2
    assert (inner.before, inner.peak) == (200, 300)
    assert (outer.before, outer.peak) == (100, 500)
    assert other.peak == 100
    assert MarkedPeak._running == []


def test_a_mark_that_is_not_cleared_tells_only_what_this_stretch_raised() -> None:
    mark = FakeMark()
    mark.go(500)
    mark.go(200)
    low, high = RaisedPeak(mark), RaisedPeak(mark)
    low.start()
    mark.go(400)
    low.stop()
    high.start()
    mark.go(700)
    high.stop()
    assert (low.before, low.peak) == (200, None)
    assert (high.before, high.peak) == (400, 700)
    assert mark.clearings == 0


def test_sampling_sees_what_lasts() -> None:
    meter = SampledPeak()
    meter.start()
    held = torch.ones(80 * MEGABYTE // 4)
    assert meter._thread is not None
    meter._stopped.wait(0.05)
    del held
    meter.stop()
    assert meter.peak is not None
    assert meter.peak - meter.before > 60 * MEGABYTE
    assert not meter._thread.is_alive()


def test_without_a_mark_of_the_system_memory_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "resident_mark", lambda: None)
    assert resident_meter(exact=True).method == "sampled"
    assert resident_meter(exact=False).method == "sampled"


def test_cuda_is_asked_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    for name, value in (("memory_allocated", 7), ("max_memory_allocated", 11), ("reset_peak_memory_stats", None)):

        def answer(device: object, name: str = name, value: int | None = value) -> int | None:
            calls.append((name, device))
            return value

        monkeypatch.setattr(torch.cuda, name, answer)
    device = torch.device("cuda:1")
    meter = cuda_meter(device, exact=True)
    assert meter is not None
    meter.start()
    meter.stop()
    assert (meter.before, meter.peak) == (7, 11)
    assert ("reset_peak_memory_stats", device) in calls
    assert {asked for _, asked in calls} == {device}
    calls.clear()
    careful = cuda_meter(device, exact=False)
    assert careful is not None
    careful.start()
    careful.stop()
    assert careful.peak is None
    assert "reset_peak_memory_stats" not in [name for name, _ in calls]
    assert cuda_meter(torch.device("cpu"), exact=True) is None
