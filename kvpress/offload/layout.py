"""How the named tensors of a block lie in one flat buffer, in memory and in a file alike."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

# Names of the safetensors format, https://huggingface.co/docs/safetensors
DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a block: its name, dtype, shape, and the byte it starts at."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BlockLayout:
    """The tensors of a block in the order of their bytes, with no holes: widest dtype first, then by name."""

    places: tuple[TensorPlace, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "BlockLayout":
        """The layout that holds `tensors`. Raises TypeError or ValueError for what no file can hold."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"tensors[{name!r}] must be a tensor, got {type(tensor).__name__}")
        return cls.from_specifications({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})

    @classmethod
    def from_specifications(cls, specifications: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> "BlockLayout":
        """The layout for tensors of the given (dtype, shape)."""
        if not specifications:
            raise ValueError("tensors must name at least one tensor, got none")
        for name, (dtype, _) in specifications.items():
            if not isinstance(name, str) or not name or name == "__metadata__":
                raise ValueError(f"tensors must have non-empty names other than '__metadata__', got {name!r}")
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"tensors[{name!r}] must have one of the dtypes {sorted(DTYPES)}, got {dtype}")
        places: list[TensorPlace] = []
        # Widest first keeps every tensor aligned to its own item size, though nothing lies between them.
        for name, (dtype, shape) in sorted(specifications.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            places.append(TensorPlace(name, dtype, shape, places[-1].stop if places else 0))
        return cls(tuple(places))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return self.places[-1].stop

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The named tensors inside a flat uint8 `buffer` of `nbytes` bytes; they share its memory."""
        return {p.name: buffer[p.start : p.stop].view(p.dtype).view(p.shape) for p in self.places}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless `tensors` has exactly these names, dtypes and shapes."""
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        wanted = {place.name: (place.dtype, place.shape) for place in self.places}
        if found != wanted:
            raise ValueError(f"out must match the block {wanted}, got {found}")

    def copy_out(self, buffer: Tensor, out: Mapping[str, Tensor]) -> None:
        """Copy the tensors in the flat uint8 `buffer` into those of `out`."""
        for name, view in self.views(buffer).items():
            out[name].copy_(view)

    def copy_into(self, buffer: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Gather `tensors`, which may be strided views, into the flat uint8 `buffer`."""
        for name, view in self.views(buffer).items():
            view.copy_(tensors[name])


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    # A tensor with one element counts as contiguous whatever its stride, and only stride 1 can be seen as bytes.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def chunks_of(layout: BlockLayout, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of `tensors` in the order of the layout; a strided or device tensor is copied, one at a time."""
    for place in layout.places:
        if place.stop > place.start:
            yield memory_of(tensors[place.name].contiguous().cpu())
