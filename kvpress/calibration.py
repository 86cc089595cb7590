"""Calibration: parameters that are found by looking at a model at work."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from kvpress.cache import PolicyCache
from kvpress.cache_argument import passed
from kvpress.policies import TidalDecode
from kvpress.policies.base import check_integer
from kvpress.policies.tidaldecode import TidalSelector

ROWS = 16  # last tokens of a text that the model is to predict


def reselect_layer(
    model: PreTrainedModel, input_ids: Tensor, top_k: int = 256, dense_layers: int = 2, rows: int = ROWS
) -> int:
    """The layer at which `TidalDecode(reselect_layer=…)` should select again, for this model and texts of this kind.

    Each text ends with what the model is to say of it: a question and its right answer. The last `rows` tokens are predicted once with the
    whole attention and once for each layer that could select again; returned is the layer that changes the predictions least. The paper
    finds the layer by the accuracy of a task (arXiv 2410.05076); the divergence of predictions tells layers apart with a few texts.

    Args:
        model: a decoder model that `PolicyCache` serves.
        input_ids: `[batch, tokens]` int64, no padding, more than `top_k + rows` tokens. `kvpress.demo.recall` makes some.
        top_k, dense_layers: as `TidalDecode` will have them.
        rows: last tokens of each text that are compared.

    Returns:
        Index among the compressed layers, above `dense_layers`.

    Raises:
        ValueError: texts that are too short, or a model with no layer left to follow.
    """
    return int(divergence(model, input_ids, top_k, dense_layers, rows).argmin()) + dense_layers + 1


def divergence(
    model: PreTrainedModel, input_ids: Tensor, top_k: int = 256, dense_layers: int = 2, rows: int = ROWS
) -> Tensor:
    """What `reselect_layer` compares, for each layer after `dense_layers`: how far predictions are from those of the whole attention.

    Same arguments. Every layer costs `rows` forwards of one token a text, and a copy of the filled cache for as long.

    Returns:
        `[compressed layers - dense_layers - 1]` fp32: mean KL(full || selected) of the next token, in nats.
    """
    for field, value, least in (("top_k", top_k, 1), ("dense_layers", dense_layers, 0), ("rows", rows, 1)):
        check_integer("calibration", field, value, least)
    if input_ids.dim() != 2 or input_ids.shape[1] <= top_k + rows:
        raise ValueError(
            f"input_ids must be [batch, tokens] with more than top_k + rows = {top_k + rows} tokens, got {tuple(input_ids.shape)}"
        )
    filled = PolicyCache(model, TidalDecode(top_k=top_k, dense_layers=dense_layers))
    layers = len(filled.policy_layers)
    if layers < dense_layers + 2:
        raise ValueError(f"dense_layers must leave two of the model's {layers} compressed layers, got {dense_layers}")
    ids = input_ids.to(model.device)
    fed = ids[:, -rows - 1 : -1]
    _forward(model, ids[:, : -rows - 1], filled)
    full = _forward(model, fed, copy.deepcopy(filled), rows)  # several tokens at once attend to everything
    found = []
    for again in range(dense_layers + 1, layers):
        cache = copy.deepcopy(filled)  # any layer's state, also that of windows, which cannot be taken back
        for ordinal, layer in enumerate(cache.policy_layers):
            cast(TidalSelector, layer.selector).chooses = ordinal in (dense_layers, again)
        selected = torch.cat([_forward(model, token, cache) for token in fed.split(1, dim=1)], dim=1)
        found.append(kl_div(selected, full, reduction="none", log_target=True).sum(dim=-1).mean().cpu())
    return torch.stack(found)


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Tensor, cache: PolicyCache, rows: int = 1) -> Tensor:
    """Logarithms of the next token's probabilities after the last `rows` tokens: `[batch, rows, vocabulary]` fp32."""
    logits: Tensor = model(ids, **passed(model, cache), use_cache=True, logits_to_keep=rows).logits
    return logits.float().log_softmax(dim=-1)
