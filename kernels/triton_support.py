"""The host side of the Triton implementations: when they can serve, strides, and how the context is split over
programs.

This module does not import `triton`, so that a refusal can be worded on a machine without it.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
OLDEST = (3, 6)
MOST_DIM = 256
PROGRAMS_A_PROCESSOR = 2  # programs wanted on every multiprocessor before the context is split no further
ENTRIES_A_SPLIT = 256  # a split shorter than this costs more in its merge than it gains
MOST_SPLITS = 64
_NOTHING = nullcontext()
ALIGNED = 16  # bytes of an address, or multiples of an integer, of which Triton compiles a special case
PACKED = 4  # bytes by which the length of packed int8 rows is divisible
AUTOTUNE_SWITCH = "KVPRESS_TRITON_AUTOTUNE"  # "0": take the first tile that fits, time nothing


def interpreted() -> bool:
    """Whether Triton's interpreter is on, so that kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refusal(tensor: Tensor, *others: Tensor | None) -> str | None:
    """Why no Triton kernel can run on these tensors, or `None`. Storage is checked by `storage_refusal`."""
    if not tensor.is_cuda and not interpreted():
        return f"Triton runs on GPUs, not on {tensor.device} (but for its interpreter: TRITON_INTERPRET=1)"
    if (missing := _missing()) is not None:
        return missing
    for other in others:
        if other is not None and other.device != tensor.device:
            return f"all tensors must be on {tensor.device}, one is on {other.device}"
    if tensor.dtype == torch.float64:
        return "the Triton kernels compute in fp32, and query is fp64"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (tensor, *others)):
        return "the Triton kernels have no gradient"
    return None


@cache
def _missing() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    found = import_module("triton").__version__
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return (
            f"triton must be {OLDEST[0]}.{OLDEST[1]} or later, the oldest that the kernels were run with, got {found}"
        )
    return None


def storage_refusal(*stored: Tensor) -> str | None:
    """Why slots stored like this cannot be read, or `None`."""
    for tensor in stored:
        if tensor.dtype not in STORAGE:
            return f"slots must be stored in fp32, fp16, bf16 or int8, got {tensor.dtype}"
        if tensor.shape[-1] > MOST_DIM:
            return f"head sizes go up to {MOST_DIM}, got {tensor.shape[-1]}"
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of `tensor`."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


@cache
def _stride_names(letter: str, axes: str) -> tuple[str, ...]:
    return tuple(f"stride_{letter}{axis}" for axis in axes)


def strides(letter: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """Kernel arguments `stride_<letter><axis>`: 0 where the size is 1, so that it broadcasts, and everywhere for
    `None`.
    """
    if tensor is None:
        return dict.fromkeys(_stride_names(letter, axes), 0)
    return named_strides(letter, tensor.shape, tensor.stride(), axes)


def named_strides(letter: str, shape: tuple[int, ...], stride: tuple[int, ...], axes: str) -> dict[str, int]:
    """`strides` of a tensor of this shape and these strides."""
    sizes = [0 if size == 1 else step for size, step in zip(shape, stride, strict=True)]
    return dict(zip(_stride_names(letter, axes), sizes, strict=True))


def stride_unit(*slots: Tensor) -> int:
    """In how many elements the strides of slots are counted: of packed int8 rows, whose length is a multiple of 4 and not of 16, in
    fours, which tells the compiler that it may read four bytes at once.
    """
    steps = [step for tensor in slots for step in tensor.stride()[:-1]]
    packed = all(tensor.dtype == torch.int8 and tensor.data_ptr() % PACKED == 0 for tensor in slots)
    return PACKED if packed and all(step % PACKED == 0 for step in steps) else 1


def slot_strides(letter: str, tensor: Tensor | None, axes: str, unit: int = 1) -> dict[str, int]:
    """`strides` of slots, all but that of the channels in units of `unit`; the flat layout has neither batch nor head, for which its
    `starts` stand.
    """
    if tensor is not None and tensor.dim() == len(axes) - 2:
        found = strides(letter, None, axes[:2]) | strides(letter, tensor, axes[2:])
    else:
        found = strides(letter, tensor, axes)
    if unit == 1:
        return found
    channel = f"stride_{letter}{axes[-1]}"
    return {name: stride if name == channel else stride // unit for name, stride in found.items()}


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the GPU that holds `tensor`; 1 on a CPU."""
    return _processors(tensor.device) if tensor.is_cuda else 1


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def plan_splits(tensor: Tensor, programs: int, entries: int) -> int:
    """Into how many parts to cut `entries` so that `programs` times that many keep the GPU busy."""
    wanted = -(-PROGRAMS_A_PROCESSOR * processors(tensor) // max(1, programs))
    return max(1, min(wanted, entries // ENTRIES_A_SPLIT, MOST_SPLITS))


def timed(configs: list[Any]) -> list[Any]:
    """What the autotuner is to time: in the interpreter, or where the switch says so, the first alone, which is not
    timed.
    """
    untimed = interpreted() or os.environ.get(AUTOTUNE_SWITCH, "1") == "0"
    return configs[:1] if untimed else configs
