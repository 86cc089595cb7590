"""Launches of Triton kernels that skip most of Triton's own Python.

Triton looks at every argument of every launch to find what it compiled for such arguments; with sixty arguments that takes a quarter of a
millisecond, several times what the kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch

from kvpress.kernels.triton_support import interpreted

ALIGNED = 16  # bytes of an address, or multiples of an integer, of which Triton compiles a special case
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

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self._launch, grid)

    @cached_property
    def _parameters(self) -> list[tuple[str, bool]]:
        """Name of each parameter, and whether it is a constant."""
        function = self.kernel if hasattr(self.kernel, "params") else self.kernel.fn
        return [(parameter.name, parameter.is_constexpr) for parameter in function.params]

    @cached_property
    def _direct(self) -> bool:
        """Whether compiled objects take all arguments in order, constants included: from Triton 3.3 on."""
        import triton

        return not interpreted() and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)

    def _launch(self, grid: Any, *arguments: Any, **named: Any) -> None:
        if not self._direct:
            self.kernel[grid](*arguments, **named)
            return
        parameters = self._parameters
        values = [*arguments, *(named.get(name) for name, _ in parameters[len(arguments) :])]
        kind = tuple(
            value if constant else _kind(value) for value, (_, constant) in zip(values, parameters, strict=True)
        )
        key = (torch.cuda.current_device(), *kind)
        found = self._compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*arguments, **named)
            chosen = getattr(self.kernel, "best_config", None)
            self._compiled[key] = (compiled, {**named, **({} if chosen is None else chosen.kwargs)})
            return
        compiled, meta = found
        size = grid(meta) if callable(grid) else grid
        compiled[(*size, 1, 1)[:3]](*values)


def _kind(value: Any) -> Any:
    """What of a run-time argument decides which compiled object serves."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % ALIGNED == 0
    if type(value) is int:
        return value == 1, value % ALIGNED == 0, -SMALL <= value < SMALL, value < 2 * SMALL
    return value if value is None else type(value)
