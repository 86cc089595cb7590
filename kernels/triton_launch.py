"""Launches of Triton kernels that skip most of Triton's own Python.

Triton looks at every argument of every launch to find what it compiled for such arguments; with sixty arguments that takes a quarter of a
millisecond, several times what the kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch

from kvpress.kernels.triton_support import ALIGNED, interpreted

SMALL = 1 << 31


class Remembered:
    """A Triton kernel (autotuned or not) that remembers what was compiled for each kind of arguments.

    `kernel[grid](…)` launches as the kernel itself does. The first launch of a kind goes through Triton, later ones hand the arguments to
    the compiled object that it returned (`CompiledKernel.__getitem__`, as in Triton's tutorial on fused softmax). Kinds are told apart at
    least as finely as Triton does: values of constants, types, alignment, and which integers are 1 or multiples of 16.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["kernel"], name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return partial(self._launch, grid)

    @cached_property
    def parameters(self) -> list[tuple[str, Callable[[Any], Any]]]:
        """Name of each parameter, and what of its argument decides which compiled object serves."""
        function = self.kernel if hasattr(self.kernel, "params") else self.kernel.fn
        return [
            (each.name, _same if each.is_constexpr else _size if each.do_not_specialize else _kind)
            for each in function.params
        ]

    @cached_property
    def direct(self) -> bool:
        """Whether compiled objects take all arguments in order, constants included: from Triton 3.3 on."""
        import triton

        return not interpreted() and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)

    def _launch(self, grid: Any, *arguments: Any, **named: Any) -> Any:
        """Launch; the compiled object, or `None` where there is none to launch directly."""
        if not self.direct:
            self.kernel[grid](*arguments, **named)
            return None
        parameters = self.parameters
        values = [*arguments, *(named.get(name) for name, _ in parameters[len(arguments) :])]
        kind = tuple([decides(value) for value, (_, decides) in zip(values, parameters, strict=True)])
        key = (torch.cuda.current_device(), *kind)
        found = self._compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*arguments, **named)
            chosen = getattr(self.kernel, "best_config", None)
            self._compiled[key] = (compiled, {**named, **({} if chosen is None else chosen.kwargs)})
            return compiled
        compiled, meta = found
        size = grid(meta) if callable(grid) else grid
        compiled[(*size, 1, 1)[:3]](*values)
        return compiled


class PreparedLaunch:
    """Launches of a kernel that differ in a few arguments only, and not in their kind: nothing is looked up for them.

    Args:
        kernel: the kernel.
        arguments: by name, without those that an autotuner sets; what differs is given to each launch.
    """

    def __init__(self, kernel: Remembered, arguments: dict[str, Any]) -> None:
        self._kernel = kernel
        self._arguments = arguments
        self._values: list[Any] = []
        self._place: dict[str, int] = {}
        self._launch: Callable[[tuple[int, int, int], list[Any]], None] | None = None

    def __call__(self, grid: tuple[int, int, int], **changed: Any) -> None:
        """Launch with `changed` arguments, whose types, alignment and divisibility must be those of the first launch."""
        if self._launch is None:
            compiled = self._kernel[grid](**self._arguments, **changed)
            if compiled is not None:
                names = [name for name, _ in self._kernel.parameters]
                self._values = [self._arguments.get(name) for name in names]
                self._place = {name: place for place, name in enumerate(names)}
                self._launch = launch_of(compiled)
            return
        values, place = (
            self._values.copy(),
            self._place,
        )  # threads may launch the same, and nothing of a call stays alive
        for name, value in changed.items():
            values[place[name]] = value
        self._launch(grid, values)


def launch_of(compiled: Any) -> Callable[[tuple[int, int, int], list[Any]], None]:
    """What launches a compiled object on the current device: as `CompiledKernel.__getitem__` does, but that what it looks up every time is
    looked up once. Where somebody listens to launches (`triton.knobs.runtime`), they go the whole way."""
    from triton import knobs
    from triton.runtime import driver

    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    stream, device, runtime = driver.active.get_current_stream, torch.cuda.current_device(), knobs.runtime

    def launch(grid: tuple[int, int, int], values: list[Any]) -> None:
        if _heard(runtime.launch_enter_hook) or _heard(runtime.launch_exit_hook):
            compiled[grid](*values)
        else:
            run(*grid, stream(device), function, packed, None, None, None, *values)

    return launch


def _heard(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def _same(value: Any) -> Any:
    return value


def _size(value: Any) -> Any:
    """Of an integer that is not specialised on: its type."""
    return _kind(value) if type(value) is not int else (-SMALL <= value < SMALL, value < 2 * SMALL)


def _kind(value: Any) -> Any:
    """Type, alignment and divisibility of a run-time argument."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % ALIGNED == 0
    if type(value) is int:
        return value == 1, value % ALIGNED == 0, -SMALL <= value < SMALL, value < 2 * SMALL
    return value if value is None else type(value)
