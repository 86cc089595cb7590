"""The cache's own arithmetic is that of its tensors' types."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_AS_IT_IS: AbstractContextManager[None] = nullcontext()


def own_precision(device: torch.device) -> AbstractContextManager[None]:
    """Switches `torch.autocast` off meanwhile, which would round scores to its type before the softmax."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS
