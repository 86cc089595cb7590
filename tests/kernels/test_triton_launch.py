"""Remembered launches: what was compiled for a kind of arguments serves that kind and no other."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.runtime import driver

from kvpress.kernels import triton_launch
from kvpress.kernels.triton_launch import PreparedLaunch, Remembered


@dataclass
class Parameter:
    name: str
    is_constexpr: bool = False
    do_not_specialize: bool = False


@dataclass
class Compiled:
    """As Triton's compiled object: launches with all arguments in order, the whole way or as `CompiledKernel` itself goes on."""

    launches: list[tuple[Any, ...]] = field(default_factory=list)
    short: int = 0
    function, packed_metadata = "function", "packed"

    def __getitem__(self, grid: tuple[int, int, int]):
        return lambda *arguments: self.launches.append((grid, arguments))

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        assert arguments[:6] == (STREAM, "function", "packed", None, None, None)
        self.short += 1
        self.launches.append(((x, y, z), arguments[6:]))


STREAM = 70


class Kernel:
    """As a jitted function with the parameters `x, count, scale, BLOCK, many`."""

    params: ClassVar = [
        Parameter("x"),
        Parameter("count"),
        Parameter("scale"),
        Parameter("BLOCK", True),
        Parameter("many", False, True),
    ]

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: Any):
        def launch(*arguments: Any, **named: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Remembered:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda device: STREAM + device))
    return Remembered(Kernel())


def test_the_second_launch_of_a_kind_goes_to_the_compiled_object(kernel: Remembered) -> None:
    x, y = torch.zeros(64), torch.ones(64)
    kernel[(3,)](x, 7, scale=0.5, BLOCK=16)
    kernel[(4, 2)](y, 9, scale=1.5, BLOCK=16)
    (compiled,) = kernel.compiled
    ((grid, arguments),) = compiled.launches
    assert grid == (4, 2, 1) and arguments[0] is y and arguments[1:] == (9, 1.5, 16, None)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(64, dtype=torch.float16)},
        {"x": torch.zeros(64)[1:]},  # another alignment
        {"x": None},
        {"count": 16},
        {"count": 1},
        {"count": 2**31},
        {"count": 2**32},
        {"scale": None},
        {"scale": 3},
        {"BLOCK": 32},
        {"many": 2**31},
    ],
    ids=str,
)
def test_another_kind_is_compiled_anew(kernel: Remembered, other: dict[str, Any]) -> None:
    first = {"x": torch.zeros(64), "count": 7, "scale": 0.5, "BLOCK": 16, "many": 5}
    kernel[(1,)](**first)
    kernel[(1,)](**first | other)
    assert len(kernel.compiled) == 2 and not any(compiled.launches for compiled in kernel.compiled)
    kernel[(1,)](**first | other)
    assert [len(compiled.launches) for compiled in kernel.compiled] == [0, 1]


def test_another_device_is_compiled_for_anew(kernel: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in (0, 1, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        kernel[(1,)](torch.zeros(64), 7, 0.5, BLOCK=16)
    assert [len(compiled.launches) for compiled in kernel.compiled] == [0, 1]


def test_a_grid_of_the_tile_asks_what_the_autotuner_chose(kernel: Remembered) -> None:
    kernel.kernel.best_config = type("Config", (), {"kwargs": {"BLOCK": 8}})()

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (-(-100 // meta["BLOCK"]),)

    for _ in range(2):
        kernel[grid](torch.zeros(64), 7, scale=0.5)
    assert kernel.compiled[0].launches[0][0] == (13, 1, 1)


def test_the_interpreter_is_asked_every_time(kernel: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "interpreted", lambda: True)
    for _ in range(2):
        kernel[(1,)](torch.zeros(64), 7, 0.5, BLOCK=16)
    assert len(kernel.compiled) == 2


def test_what_is_not_specialised_on_may_be_any_number_of_its_type(kernel: Remembered) -> None:
    for many in (5, 16, 1):
        kernel[(1,)](torch.zeros(64), 7, 0.5, 16, many)
    assert [arguments[-1] for _, arguments in kernel.compiled[0].launches] == [16, 1] and len(kernel.compiled) == 1


def test_a_prepared_launch_changes_what_it_is_told_and_keeps_nothing(kernel: Remembered) -> None:
    launch = PreparedLaunch(kernel, {"count": 7, "scale": 0.5, "BLOCK": 16})
    tensors = [torch.zeros(64), torch.ones(64), torch.ones(32)]
    for many, x in enumerate(tensors):
        launch((many, 1, 1), x=x, many=many)
    (compiled,) = kernel.compiled
    assert [grid for grid, _ in compiled.launches] == [(1, 1, 1), (2, 1, 1)] and compiled.short == 2
    assert [arguments[0] is x for (_, arguments), x in zip(compiled.launches, tensors[1:], strict=True)] == [True, True]
    assert [arguments[1:] for _, arguments in compiled.launches] == [(7, 0.5, 16, 1), (7, 0.5, 16, 2)]
    references = weakref.ref(tensors[1])
    compiled.launches.clear()
    del tensors, x
    assert references() is None


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_to_launches_hears_prepared_ones(kernel: Remembered, hook: str) -> None:
    launch = PreparedLaunch(kernel, {"count": 7, "scale": 0.5, "BLOCK": 16})
    heard = getattr(knobs.runtime, hook)
    for listening in (False, True, False):
        if listening:
            heard.add(print)
        launch((1, 1, 1), x=torch.zeros(64), many=3)
        heard.remove(print)
    (compiled,) = kernel.compiled
    assert len(compiled.launches) == 2 and compiled.short == 1


def test_the_interpreter_gets_prepared_launches_whole(kernel: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "interpreted", lambda: True)
    launch = PreparedLaunch(kernel, {"count": 7, "scale": 0.5, "BLOCK": 16})
    for _ in range(2):
        launch((1, 1, 1), x=torch.zeros(64), many=3)
    assert len(kernel.compiled) == 2
