"""Devices that this machine does not have: tensors that say where they are, compute on the CPU, and refuse to meet elsewhere.

Inside `with SeveralDevices():` any tensor or module can be moved to `ipu:0`, `ipu:1`, … (a device type that torch knows by name and
that needs no driver). Its `device` is the one it was moved to, operators on it run on the CPU copy that it holds, and an operator that
is given tensors of two devices raises, as CUDA's do: only copies cross, and numbers (0-d tensors of the CPU).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_crossings: ContextVar[Counter[tuple[str, str]] | None] = ContextVar("crossings", default=None)


class MixedDevicesError(RuntimeError):
    """An operator was given tensors of several devices."""


class DeviceTensor(Tensor):
    """A tensor on a device that only exists in name.

    Attributes:
        held: the numbers, on the CPU.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    def untyped_storage(self) -> Any:
        """Of the numbers: their size counts as held on the device."""
        return self.held.untyped_storage()

    # by hand: torch's own way asks the driver of the device to make it the current one
    def __getitem__(self, index: Any) -> Tensor:
        return DeviceTensor(self.held[self._here(index)], self.device)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.held[self._here(index)] = self._here(value)

    def tolist(self) -> Any:
        return self.held.tolist()

    def item(self) -> Any:
        return self.held.item()

    def __int__(self) -> int:
        return int(self.held)

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __invert__(self) -> Tensor:
        return torch.bitwise_not(self)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return self if self.is_contiguous() else self.clone(memory_format=memory_format)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        copied: Tensor = torch.ops.aten.copy_(self, source, non_blocking)
        return copied

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        found: Tensor = torch.ops.aten.nonzero(self)
        return found.unbind(1) if as_tuple else found

    def _here(self, tree: Any) -> Any:
        """`tree` with plain tensors for those of this device."""
        check_devices("indexing", [self, *_tensors(tree)])
        return _mapped(_plain, tree)

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        copied = memo[id(self)] = DeviceTensor(self.held.clone(), self.device)
        return copied

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.held!r}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operator, args, kwargs or {})


class SeveralDevices(TorchDispatchMode):
    """Within it `ipu:0`, `ipu:1`, … are devices."""

    def __enter__(self) -> SeveralDevices:
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # else `torch.tensor(…, device=…)` would ask the device itself
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operator, args, kwargs or {})


@contextmanager
def counted_crossings() -> Iterator[Counter[tuple[str, str]]]:
    """Copies from one device to another, counted by `(from, to)`."""
    counter: Counter[tuple[str, str]] = Counter()
    token = _crossings.set(counter)
    try:
        yield counter
    finally:
        _crossings.reset(token)


def devices_of(tensors: Iterable[Tensor]) -> set[torch.device]:
    """Where they are; numbers on the CPU (0-d tensors) are anywhere."""
    return {item.device for item in tensors if item.dim() or item.device != CPU}


def check_devices(operator: str, tensors: Iterable[Tensor]) -> set[torch.device]:
    """Raise `MixedDevicesError` where `tensors` are on several devices."""
    found = devices_of(tensors)
    if len(found) > 1:
        raise MixedDevicesError(f"{operator} got tensors on {sorted(map(str, found))}")
    return found


def _run(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = _tensors((args, kwargs))
    found = devices_of(tensors) if operator in _COPIES else check_devices(str(operator), tensors)
    if operator is torch.ops.aten._fused_sdp_choice.default:
        return 0  # in plain operators: the fused ones go by a device's own keys
    device = tensors[0].device if operator in _COPIES else next(iter(found), CPU)
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        kwargs = {**kwargs, "device": CPU}
    _count(operator, tensors, device)
    plain = _mapped(_plain, args)
    result = operator(*plain, **_mapped(_plain, kwargs))
    if operator is torch.ops.aten._to_copy.default and result is plain[0]:
        result = result.clone()
    if device == CPU:
        return result
    given = {id(item.held): item for item in tensors if isinstance(item, DeviceTensor)}  # of operators in place

    def placed(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        return given[id(item)] if id(item) in given else DeviceTensor(item, device)

    return _mapped(placed, result)


def _plain(item: Any) -> Any:
    return item.held if isinstance(item, DeviceTensor) else item


def _mapped(function: Any, tree: Any) -> Any:
    """`tree` with `function` of every leaf."""
    if isinstance(tree, tuple | list):
        return type(tree)(_mapped(function, item) for item in tree)
    if isinstance(tree, dict):
        return {key: _mapped(function, item) for key, item in tree.items()}
    return function(tree)


def _tensors(tree: Any) -> list[Tensor]:
    """Every tensor in `tree`."""
    found: list[Tensor] = []
    _mapped(lambda item: found.append(item) if isinstance(item, Tensor) else None, tree)
    return found


def _count(operator: Any, tensors: list[Tensor], device: torch.device) -> None:
    counter = _crossings.get()
    if counter is None or operator not in _COPIES:
        return
    source = tensors[-1].device
    if source != device:
        counter[str(source), str(device)] += 1
