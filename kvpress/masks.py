"""The mask function registered under the name "kvpress"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from kvpress.delegates import original_implementation
from kvpress.errors import UnsupportedModelError


class LogicalLength(int):
    """A number of keys in logical coordinates (tokens seen), which a `PolicyCache` reports.

    The type tells the mask function, with no global state, that the mask is for our attention and not for a stock cache.
    """


def padding_mask(**arguments: Any) -> Any:
    """What our attention needs of a mask: which tokens are padding. Causality it knows from positions.

    Returns `None` where no token is padding, else `[batch, 1, 1, tokens seen]` bool, `False` for padding. For a stock cache (or a
    sliding layer) the mask of the model's own attention implementation. For the window of a layer that is compressed one that our
    attention refuses.

    Raises:
        UnsupportedModelError: a mask that is more than causality and padding.
    """
    if not isinstance(arguments["kv_length"], LogicalLength):
        return ALL_MASK_ATTENTION_FUNCTIONS[original_implementation(arguments["config"])](**arguments)
    if arguments.get("local_size") is not None:  # of a window, which some models make though no layer of theirs slides
        return torch.zeros(0, dtype=torch.bool)
    if arguments.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise UnsupportedModelError(
            "attention mask must be causal plus padding for a compressed layer, got one with further rules (packed sequences, blocks, "
            "image tokens)"
        )
    mask: Tensor | None = arguments.get("attention_mask")
    if mask is None:
        return None
    if mask.shape[-1] < arguments["kv_length"]:  # tokens fed without a mask of their own are real
        rest = torch.ones(mask.shape[0], arguments["kv_length"] - mask.shape[-1], dtype=torch.bool, device=mask.device)
        mask = torch.cat([mask, rest], dim=-1)
    return mask[:, None, None, : int(arguments["kv_length"])]
