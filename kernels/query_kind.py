"""What a prepared call supposes of the queries that it will be asked with."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels import triton_support


class QueryKind:
    """Shape, strides, type and alignment of `query`, which kernels were told of."""

    def __init__(self, query: Tensor) -> None:
        self._kind = self._of(query)

    @staticmethod
    def _of(query: Tensor) -> tuple[object, ...]:
        return query.shape, query.stride(), query.dtype, query.data_ptr() % triton_support.ALIGNED

    def serves(self, query: Tensor) -> bool:
        """Whether `query` is of this kind, and nothing but its numbers is asked for: no gradient, no trace of the operations."""
        return (
            self._of(query) == self._kind
            and not (query.requires_grad and torch.is_grad_enabled())
            and not torch.compiler.is_compiling()
        )
