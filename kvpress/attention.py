"""The attention function registered under the name "kvpress"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from kvpress.decode_step import AttentionCall, DecodeStep
from kvpress.delegates import NAME, original_attention
from kvpress.errors import CacheStateError, UnsupportedModelError
from kvpress.forward import take_over
from kvpress.masks import padding_mask
from kvpress.observation import AttentionArguments
from kvpress.precision import own_precision


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend over the slots of the layer whose `update` returned `key`; hand anything else to the model's own attention.

    Args:
        query: `[batch, query_heads, rows, dim]`, rotated.
        key, value: what `PolicyCache.update` returned, or what the model made of it.
        attention_mask: from `padding_mask`.
        kwargs: `softcap`, `s_aux` (sinks), `position_ids`, … as the model passes them.

    Returns:
        `[batch, rows, query_heads, value_dim]`, and no weights.
    """
    forward = take_over(key, getattr(module, "layer_idx", -1))
    layer = None if forward is None else forward.layer()
    if forward is None or layer is None:
        original = original_attention(module)
        result: tuple[Tensor, Tensor | None] = original(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return result
    owner = layer.layer_idx == module.layer_idx  # else a layer that shares the keys of an earlier one
    if isinstance(forward, DecodeStep):
        check_call(attention_mask, dropout if module.training else 0.0, kwargs)
        at_once = forward.attend(query, key, attention_mask, scaling, kwargs)
        if at_once is not None:
            return at_once, None
        forward = forward.leave()
    arguments = AttentionArguments(
        query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap"), kwargs.get("s_aux")
    )
    with own_precision(query.device):
        if owner:
            check_call(attention_mask, dropout if module.training else 0.0, kwargs)
            tokens = layer.place(forward, attention_mask, query.device, kwargs.get("position_ids"))
            layer.clock.check_positions(tokens, layer.seen, kwargs.get("position_ids"))
        output = layer.attend(forward, query, key, value, arguments)
        if owner:
            layer.prepare_step(forward, AttentionCall(query, key, value, scaling, kwargs))
            layer.finish(forward, query, key, arguments)
        else:
            layer.lend()
    if output.requires_grad:
        output.register_hook(_refuse_backward)
    if forward.rows == 1 and output.shape[2] == 1 and output.is_contiguous():
        return output.view(output.shape[0], 1, output.shape[1], output.shape[3]), None  # as below, by one call less
    return output.transpose(1, 2).contiguous(), None


def _refuse_backward(gradient: Tensor) -> Tensor:
    raise CacheStateError(
        "a PolicyCache holds keys and values without their history: gradients through it would be wrong"
    )


def check_call(mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuse what would be silently wrong.

    Raises:
        UnsupportedModelError: a mask that is not ours, a sliding window or a bias on a full-attention layer, attention that is not causal,
            dropout.
    """
    if mask is not None and (mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.dtype != torch.bool):
        raise UnsupportedModelError(
            f"attention_mask must be 2-D padding [batch, tokens seen] with a PolicyCache, got {tuple(mask.shape)} of {mask.dtype}"
        )
    if kwargs.get("sliding_window") is not None:
        raise UnsupportedModelError(
            f"sliding_window must be None on a compressed layer, got {kwargs['sliding_window']}: its layer type says full attention"
        )
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(
            "position_bias must be None with a PolicyCache: models that bias scores by distance are not served"
        )
    if kwargs.get("is_causal") is False:
        raise UnsupportedModelError("is_causal must be True with a PolicyCache, got False")
    if dropout:
        raise UnsupportedModelError(f"attention dropout must be 0 with a PolicyCache, got {dropout}: call model.eval()")


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
