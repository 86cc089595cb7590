"""What the native kernels need to know of tensors: storage kinds, and the fields of `Slots` in `arguments.hpp`."""

from __future__ import annotations

import struct
from array import array
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.native import extension, missing

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
INT4 = 4  # the kind of packed int4 rows, which torch holds as uint8: only a vote reads them
INTEGERS = (torch.int32, torch.int64)
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_DIM = 512
NO_SCALES = (0,) * 8
NO_ROTATION = (0,) * 5
# the fields of `Attention` in `arguments.hpp`, in their order
ATTENTION = (
    "threads", "batch", "query_heads", "kv_heads", "rows",
    "query", "query_kind", "query_batch", "query_head", "query_row",
    "keys", "values", "kind", "dim", "value_dim", "slots",
    "key_batch", "key_head", "key_slot", "value_batch", "value_head", "value_slot",
    "key_scale", "value_scale", "key_scale_batch", "key_scale_head", "key_scale_slot",
    "value_scale_batch", "value_scale_head", "value_scale_slot",
    "positions", "position_bytes", "position_batch", "position_head",
    "starts", "lengths", "flat_rows", "index", "index_batch", "index_head", "index_count",
    "query_positions", "query_position_batch", "causal", "scaling", "softcap", "sinks",
    "cosine", "sine", "rotary", "table_rows", "table_row",
    "output", "lse", "weights", "weights_reduction", "weights_entries",
)  # fmt: skip
PLACE = {name: place for place, name in enumerate(ATTENTION)}
_PACKED = struct.Struct("=" + "".join("d" if name in ("scaling", "softcap") else "q" for name in ATTENTION))
EMPTY = 8  # the address of an empty list, never read: torch gives 0, which would mean "no list given"


def built() -> Any:
    """The extension; a caller has asked `refusal` first."""
    if extension is None:
        raise RuntimeError(str(missing))
    return extension


def as_int64(tensor: Tensor) -> Tensor:
    """The same integers as int64 with a contiguous last dimension; no copy where they already are."""
    if tensor.dtype != torch.int64:
        tensor = tensor.long()  # a call that does nothing costs as much as a small kernel: it is made only where needed
    return tensor if tensor.stride()[-1] == 1 else tensor.contiguous()


def as_integers(tensor: Tensor) -> Tensor:
    """The same integers as int32 or int64 with a contiguous last dimension; no copy where they already are."""
    if tensor.dtype not in INTEGERS:
        tensor = tensor.long()
    return tensor if tensor.stride()[-1] == 1 else tensor.contiguous()


def as_floats(tensor: Tensor) -> Tensor:
    """The same numbers as contiguous fp32; no copy where they already are."""
    if tensor.dtype != torch.float32:
        tensor = tensor.float()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def batch_and_head_strides(tensor: Tensor, batch: int, heads: int) -> tuple[int, int]:
    """Element strides of the first two dimensions, 0 where the size is 1 and stands for all."""
    strides = tensor.stride()
    return (strides[0] if tensor.shape[0] == batch else 0), (strides[1] if tensor.shape[1] == heads else 0)


def vote_refusal(query: Tensor, keys: Tensor) -> str | None:
    """Why no native kernel can vote on these keys, or `None`."""
    if keys.dtype == torch.uint8:  # of int4, which are read by the byte
        keys = keys.view(torch.int8)
    return refusal(query, keys, keys)


def refusal(query: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Why no native kernel can serve these tensors, or `None`."""
    if missing is not None:
        return missing
    if not (query.is_cpu and keys.is_cpu and values.is_cpu):
        return "native kernels read host memory only"
    kind = keys.dtype
    if query.dtype not in FLOATS:
        return f"native kernels take fp32, bf16 and fp16 queries, not {query.dtype}"
    if kind not in KINDS or kind != values.dtype:
        return f"native kernels take fp32, bf16, fp16 and int8 slots of one type, not {kind} and {values.dtype}"
    if keys.shape[-1] > MAX_DIM or values.shape[-1] > MAX_DIM:
        return f"native kernels take head sizes up to {MAX_DIM}, not {keys.shape[-1]} and {values.shape[-1]}"
    if not query.stride()[-1] == keys.stride()[-1] == values.stride()[-1] == 1:
        return "native kernels need a contiguous last dimension of query, keys and values"
    if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad):
        return "native kernels have no gradient"
    return None


def slot_fields(
    keys: Tensor,
    values: Tensor,
    batch: int,
    kv_heads: int,
    positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    index: Tensor | None,
    keys_scale: Tensor | None,
    values_scale: Tensor | None,
) -> tuple[tuple[int, ...], list[Tensor]]:
    """The fields of `Slots`, and the tensors that own the memory they point to: keep these until the call returns."""
    owners = []
    key_strides, value_strides = keys.stride(), values.stride()
    if starts is None or lengths is None:
        slots = keys.shape[2]
        layout = (slots, *key_strides[:3], *value_strides[:3])
        flat: tuple[int, int, int] = (0, 0, 0)
    else:
        given = 0 if positions is None else positions.shape[-1]
        layout = (given, 0, 0, key_strides[0], 0, 0, value_strides[0])
        starts, lengths = as_int64(starts).contiguous(), as_int64(lengths).contiguous()
        owners += [starts, lengths]
        flat = (starts.data_ptr(), lengths.data_ptr(), keys.shape[0])
    scales: tuple[int, ...] = NO_SCALES
    if keys_scale is not None:
        scale_pointers, scale_strides = [], []
        for scale in (keys_scale, values_scale):
            if scale is None:
                scale_pointers.append(0)
                scale_strides += [0, 0, 0]
                continue
            scale = scale.float()
            owners.append(scale)
            scale_pointers.append(scale.data_ptr())
            scale_strides += scale.stride() if starts is None else (0, 0, *scale.stride())
        scales = (*scale_pointers, *scale_strides)
    placed = (0, 0, 0, 0)
    if positions is not None:
        positions = as_integers(positions)
        owners.append(positions)
        placed = (
            positions.data_ptr(),
            positions.element_size(),
            *batch_and_head_strides(positions, batch, kv_heads),
        )
    listed = (0, 0, 0, 0)
    if index is not None:
        index = as_int64(index)
        owners.append(index)
        listed = (index.data_ptr() or EMPTY, *batch_and_head_strides(index, batch, kv_heads), index.shape[-1])
    fields = (
        keys.data_ptr(),
        values.data_ptr(),
        *((INT4, 2 * keys.shape[-1]) if keys.dtype == torch.uint8 else (KINDS[keys.dtype], keys.shape[-1])),
        values.shape[-1],
        *layout,
        *scales,
        *placed,
        *flat,
        *listed,
    )
    return fields, owners


def attention_fields(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    kv_heads: int,
    scaling: float = 1.0,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    index: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keys_scale: Tensor | None = None,
    values_scale: Tensor | None = None,
    output: int = 0,
    lse: int = 0,
    weights: int = 0,
    reduction: int = 0,
    entries: int = 0,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[float, ...], list[Tensor]]:
    """The fields of `Attention`, and the tensors to keep until the call returns; results are given by address."""
    batch, query_heads, rows, _ = query.shape
    slots, owners = slot_fields(
        keys, values, batch, kv_heads, positions, starts, lengths, index, keys_scale, values_scale
    )
    seen = (0, 0)
    if query_positions is not None:
        query_positions = as_int64(query_positions)
        owners.append(query_positions)
        seen = (query_positions.data_ptr(), query_positions.stride(0) if query_positions.shape[0] == batch else 0)
    sink_pointer = 0
    if sinks is not None:
        sinks = as_floats(sinks)
        owners.append(sinks)
        sink_pointer = sinks.data_ptr()
    turned = NO_ROTATION
    if rotation is not None:
        cosine, sine = (as_floats(table) for table in rotation)
        owners += [cosine, sine]
        turned = (cosine.data_ptr(), sine.data_ptr(), cosine.shape[1], cosine.shape[0], cosine.stride(0))
    strides = query.stride()
    fields = (
        torch.get_num_threads(),
        batch,
        query_heads,
        kv_heads,
        rows,
        query.data_ptr(),
        FLOATS[query.dtype],
        strides[0],
        strides[1],
        strides[2],
        *slots,
        *seen,
        int(causal),
        scaling,
        softcap or 0.0,
        sink_pointer,
        *turned,
        output,
        lse,
        weights,
        reduction,
        entries,
    )
    return fields, owners


def packed(fields: tuple[float, ...]) -> array[int]:
    """The fields of `Attention` in a buffer for `attention_again`; integers and addresses in it may be changed, by `PLACE`."""
    return array("q", _PACKED.pack(*fields))


def prefer_large_pages(tensor: Tensor) -> None:
    """Ask the system to back a tensor in host memory, not yet written to, with large pages, so that reading scattered rows of it needs
    fewer look-ups of addresses. Does nothing without the extension, or where the system knows no such thing."""
    if missing is None:
        built().prefer_large_pages(tensor.data_ptr(), tensor.nbytes)
