"""Attention of decoded tokens over slots whose memory stays where it is: what is the same at every token is looked up once."""

from __future__ import annotations

from array import array
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.kernels import triton_support
from kvpress.kernels.attention import native
from kvpress.kernels.attention.api import attend, attend_with_weights
from kvpress.kernels.attention.turned import attend_turned
from kvpress.kernels.native import tensors as fields

if TYPE_CHECKING:
    from kvpress.kernels.attention.triton_prepared import PreparedRow

THREADS, QUERY, SLOTS = fields.PLACE["threads"], fields.PLACE["query"], fields.PLACE["slots"]
INDEX, INDEX_COUNT = fields.PLACE["index"], fields.PLACE["index_count"]
COSINE, SINE = fields.PLACE["cosine"], fields.PLACE["sine"]
OUTPUT, WEIGHTS, ENTRIES = fields.PLACE["output"], fields.PLACE["weights"], fields.PLACE["weights_entries"]


class PreparedAttention:
    """`attend`, `attend_with_weights` and `attend_turned` of a single row over slots whose memory and layout do not change.

    Of dense slots more may be in use at every call, and a call may list some of them. The first call of a kind goes the usual way, with
    all checks. Where the compiled kernels serve it, later calls of the same kind hand them the addresses that were found then.

    Args:
        keys, values: the slots, dense or flat, as `attend` takes them: all that there is room for.
        layout: `starts` and `lengths` of flat slots, `keys_scale` and `values_scale` of int8 ones.
    """

    def __init__(self, keys: Tensor, values: Tensor, layout: dict[str, Tensor]) -> None:
        self.keys, self.values, self._layout = keys, values, layout
        starts = layout.get("starts")
        self._dense = starts is None
        self._kv_heads = keys.shape[1] if starts is None else starts.shape[1]
        self._kind: tuple[Any, ...] | None = None
        self._fields = array("q")
        self._shape: tuple[int, ...] = ()  # of the output,
        self._heads: tuple[int, int] = (0, 0)  # and of the weights, but for
        self._longest = 0  # the slots of the longest head, of flat slots
        self._owners: list[Tensor] = []
        self._launches: PreparedRow | None = None  # on a GPU, in place of the fields

    def attend(
        self,
        query: Tensor,
        slots: int,
        *,
        scaling: float,
        positions: Tensor | None = None,
        index: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        reduction: str | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Output `[batch, query_heads, 1, value_dim]`, and with `reduction` the weights of `attend_with_weights`.

        Args:
            query: `[batch, query_heads, 1, dim]`.
            slots: of dense slots, how many are in use, from the first on.
            positions: `[batch, kv_heads or 1, slots]`; a later call with the same address reads what is there then.
            index, scaling, softcap, sinks, reduction: as of `attend_with_weights`; without `reduction` no weights are made.
            rotation: as of `attend_turned`; excludes `reduction`.

        Raises:
            ValueError, IndexError: as these functions.
        """
        kind = (
            query.shape,
            query.stride(),
            query.dtype,
            scaling,
            softcap,
            reduction,
            None if positions is None else (positions.data_ptr(), positions.stride(), self._fits(positions, slots)),
            None if index is None else (index.shape[:2], index.stride(), index.dtype),
            query.data_ptr() % triton_support.ALIGNED,
            None if sinks is None else sinks.data_ptr(),
            None if rotation is None else (rotation[0].shape, rotation[0].dtype),
        )
        if kind != self._kind or torch.compiler.is_compiling() or (query.requires_grad and torch.is_grad_enabled()):
            self._kind = None
            options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks, "index": index}
            result = self._checked(query, slots, reduction, rotation, options | {"positions": positions})
            if self._prepare(query, reduction, rotation, options | {"positions": positions}):
                self._kind = kind
            return result
        if self._launches is not None:
            return self._launches(query, slots, index, rotation)
        call, output, weights = self._fields, torch.empty(self._shape, dtype=query.dtype), None
        call[THREADS], call[QUERY], call[OUTPUT] = torch.get_num_threads(), query.data_ptr(), output.data_ptr()
        if self._dense:
            call[SLOTS] = slots
        if index is not None:
            slots = index.shape[2]
            call[INDEX], call[INDEX_COUNT] = index.data_ptr() or fields.EMPTY, slots
        if rotation is not None:
            call[COSINE], call[SINE] = rotation[0].data_ptr(), rotation[1].data_ptr()
        if reduction is not None:
            entries = slots if self._dense or index is not None else self._longest
            weights = torch.empty(*self._heads, entries, dtype=torch.float32)
            call[WEIGHTS], call[ENTRIES] = weights.data_ptr(), entries
        fields.built().attention_again(call)
        return output, weights

    def last_call(self) -> array[int] | None:
        """The fields of the compiled kernel's last call, where one served it; their tensors, and those given then, must be held on to."""
        return None if self._kind is None or self._launches is not None else self._fields[:]

    def _fits(self, positions: Tensor, slots: int) -> int:
        """Whether every slot in use has a position, and of flat slots how many have."""
        return positions.shape[2] == slots if self._dense else positions.shape[2]

    def _checked(
        self,
        query: Tensor,
        slots: int,
        reduction: str | None,
        rotation: tuple[Tensor, Tensor] | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        keys, values, layout = self.keys, self.values, dict[str, Any](self._layout)
        if self._dense:
            keys, values = keys[:, :, :slots], values[:, :, :slots]
            layout = {name: scale[:, :, :slots] for name, scale in layout.items()}
        if rotation is not None:
            return attend_turned(query, keys, values, rotation=rotation, **options, **layout)[0], None
        if reduction is None:
            return attend(query, keys, values, **options, **layout)[0], None
        output, _, weights = attend_with_weights(query, keys, values, reduction=reduction, **options, **layout)
        return output, weights

    def _prepare(
        self, query: Tensor, reduction: str | None, rotation: tuple[Tensor, Tensor] | None, options: dict[str, Any]
    ) -> bool:
        """Note the fields of the call just made, if the compiled kernels served it from the tensors themselves."""
        keys, values, layout, kv_heads = self.keys, self.values, self._layout, self._kv_heads
        weights, turned = reduction is not None, rotation is not None
        self._launches = None
        if query.is_cuda:
            return self._prepare_launches(query, reduction, rotation, options)
        if native.refusal(query, keys, values, kv_heads, weights=weights, turned=turned) is not None:
            return False
        given = [options["positions"], options["index"], options["sinks"], *(rotation or ())]
        readers = [fields.as_integers, fields.as_int64, fields.as_floats, fields.as_floats, fields.as_floats]
        if any(tensor is not None and read(tensor) is not tensor for tensor, read in zip(given, readers, strict=False)):
            return False  # a copy would not follow what is written there
        lengths = layout.get("lengths")
        self._longest = 0 if lengths is None else int(lengths.max())
        found, owners = fields.attention_fields(
            query,
            keys,
            values,
            kv_heads=kv_heads,
            starts=layout.get("starts"),
            lengths=lengths,
            keys_scale=layout.get("keys_scale"),
            values_scale=layout.get("values_scale"),
            reduction=0 if reduction is None else native.REDUCTIONS[reduction],
            rotation=rotation,
            **options,
        )
        passing = [id(tensor) for tensor in (query, options["index"], *(rotation or ()))]  # of this call alone
        self._owners = [tensor for tensor in owners if id(tensor) not in passing]
        self._fields = fields.packed(found)
        batch, heads, rows, _ = query.shape
        self._shape, self._heads = (batch, heads, rows, values.shape[-1]), (batch, kv_heads)
        return True

    def _prepare_launches(
        self, query: Tensor, reduction: str | None, rotation: tuple[Tensor, Tensor] | None, options: dict[str, Any]
    ) -> bool:
        keys, values = self.keys, self.values
        if triton_support.refusal(query, keys, values) or triton_support.storage_refusal(keys, values):
            return False
        module = import_module("kvpress.kernels.attention.triton_prepared")
        self._launches = module.PreparedRow(
            query, keys, values, self._layout, rotation=rotation, weights=reduction, **options
        )
        return True
