"""State of layers as JSON, with tensors set aside under names."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from kvpress.errors import CacheFormatError


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors go to `tensors` under names that start with `name`.

    Raises:
        CacheFormatError: a value of a type that is not saved.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, numpy.ndarray):
        return {"array": value.tolist()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": True}
    if isinstance(value, dict):
        return {"dict": [[key, encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    raise CacheFormatError(f"{name} of type {type(value).__name__} cannot be saved")


def decode(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """The inverse of `encode`; tensors and devices become those of `device`.

    Raises:
        CacheFormatError: something that `encode` does not write.
    """
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise CacheFormatError(f"state must have one tag, got {sorted(value)}")
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content].to(device)
    if tag == "array":
        return numpy.array(content, dtype=numpy.int64)
    if tag == "dtype":
        kind = getattr(torch, content, None)
        if not isinstance(kind, torch.dtype):
            raise CacheFormatError(f"dtype {content!r} is unknown")
        return kind
    if tag == "device":
        return device
    if tag == "dict":
        return {key: decode(item, tensors, device) for key, item in content}
    if tag in ("list", "tuple"):
        items = [decode(item, tensors, device) for item in content]
        return tuple(items) if tag == "tuple" else items
    raise CacheFormatError(f"tag {tag!r} is unknown")
