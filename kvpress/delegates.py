"""Which attention implementation a model had before ours: it still serves stock caches and sliding layers."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import MODEL_MAPPING, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "kvpress"
_originals: dict[int, str] = {}  # id of a living configuration -> implementation


def remember(config: PreTrainedConfig, implementation: str) -> None:
    """Note the implementation that `config`'s model had."""
    if implementation == NAME:
        return
    if id(config) not in _originals:
        weakref.finalize(config, _originals.pop, id(config), None)
    _originals[id(config)] = implementation


def original_implementation(config: PreTrainedConfig) -> str:
    """The remembered implementation; for a configuration that came with ours (a copied model) transformers' own default."""
    known = _originals.get(id(config))
    kind: Any = type(config)
    return _default_implementation(kind) if known is None else known


@functools.cache
def _default_implementation(kind: Any) -> str:
    """`"sdpa"` for families that support it: it knows no sinks and no softcap, and would leave them out without a word."""
    found = MODEL_MAPPING.get(kind, None)
    models = found if isinstance(found, tuple) else (found,)
    return "eager" if any(model is not None and not model._supports_sdpa for model in models) else "sdpa"


def original_attention(module: torch.nn.Module) -> Callable[..., Any]:
    """The attention function that `module` would use without us."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    config: Any = module.config
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(original_implementation(config), eager)  # type: ignore[arg-type]
    return function
