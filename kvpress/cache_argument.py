"""The argument and output of a model that carry the cache: `cache` since transformers 5.24, `past_key_values` before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import GenerationMixin

NAMES = ("cache", "past_key_values", "layer_past")  # the last in some attention modules (GPT-NeoX)


def passed(model: nn.Module, cache: Any) -> dict[str, Any]:
    """`cache` under the name that the forward of `model` knows: `model(ids, **passed(model, cache))`, and for `model.generate` alike."""
    return {_known(model.forward) or USUAL: cache}


def found(given: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments or the outputs of a model, or `None`."""
    return next((given[name] for name in NAMES if given.get(name) is not None), None)


def _known(function: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(function).parameters
    return next((name for name in NAMES if name in parameters), None)


# for a model that is wrapped and takes whatever comes
USUAL = _known(GenerationMixin.prepare_inputs_for_generation) or NAMES[0]
