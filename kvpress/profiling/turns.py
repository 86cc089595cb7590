"""Decoding with several caches of one model that take turns token by token, so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvpress.cache import PolicyCache
from kvpress.cache_argument import passed
from kvpress.delegates import NAME, original_implementation, remember
from kvpress.policies.base import Policy

STOCK = "stock"
WARM_UP_STEPS = 3
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest logit


@contextmanager
def attention_of(model: PreTrainedModel) -> Iterator[Callable[[bool], None]]:
    """A switch between a model's stock attention (`True`) and ours (`False`); the one it had comes back at the end."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    stock = original_implementation(config) if before == NAME else before
    remember(config, stock)
    try:
        yield lambda wanted: model.set_attn_implementation(stock if wanted else NAME)
    finally:
        model.set_attn_implementation(before)


def random_cache(model: PreTrainedModel, tokens: int, batch: int = 1, seed: int = 1) -> DynamicCache:
    """A stock cache filled with random keys and values, as if `tokens` tokens had been read: time does not depend on them.

    Raises:
        ValueError: a model with layers other than full attention, whose caches are not of keys and values alone.
    """
    cache = DynamicCache(config=model.config)
    config = model.config.get_text_config(decoder=True)
    if any(type(layer).__name__ != "DynamicLayer" for layer in cache.layers):
        raise ValueError(
            f"model type {config.model_type!r} has other layers than full attention: fill its cache with a prompt"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    generator = torch.Generator(model.device).manual_seed(seed)
    for layer in range(len(cache.layers)):
        for_layer = torch.randn(2, batch, heads, tokens, head_dim, generator=generator, device=model.device)
        keys, values = for_layer.to(model.dtype)
        cache.update(keys, values, layer)
    return cache


def decode_seconds(
    model: PreTrainedModel, caches: Mapping[str, Cache], token: Tensor, steps: int
) -> dict[str, list[float]]:
    """Seconds of each of `steps` decoding steps, after three that are not counted; caches of transformers use the stock attention.

    With one CPU thread the process's own CPU time is taken, which other programs disturb less.

    Args:
        token: `[batch, 1]` ids, fed at every step.
    """
    alone = torch.get_num_threads() == 1 and model.device.type == "cpu"
    clock = time.process_time if alone else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in caches}
    with torch.no_grad(), attention_of(model) as use_stock:
        for step in range(steps + WARM_UP_STEPS):
            for name, cache in caches.items():
                use_stock(not isinstance(cache, PolicyCache))
                given = passed(model, cache)
                _wait(model)
                start = clock()
                model(token, **given, use_cache=True)
                _wait(model)
                if step >= WARM_UP_STEPS:
                    found[name].append(clock() - start)
    return found


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each cache, and how much faster it is than the stock one: the ratio of medians."""
    base = statistics.median(seconds[STOCK])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: {"token_milliseconds": 1000 * median, "speedup": base / median} for name, median in medians.items()}


def logits_difference(model: PreTrainedModel, policy: Policy, ids: Tensor, new_tokens: int = 5) -> tuple[float, bool]:
    """How far greedy logits with `policy`, which must keep everything, lie from the stock cache's: the largest difference as a share of the
    largest logit, and whether that is within what the model's type rounds to. Where near equal logits made a row take another token, its
    later ones are of another text and are left out."""
    logits, tokens = [], []
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": 0,
    }
    with attention_of(model) as use_stock:
        for stock in (True, False):
            use_stock(stock)
            cache = DynamicCache(config=model.config) if stock else PolicyCache(model, policy)
            generate: Any = model.generate
            output = generate(ids, **passed(model, cache), **arguments)
            logits.append(torch.stack(output.logits, dim=1).float())
            tokens.append(output.sequences[:, ids.shape[1] :])
    largest = float(logits[0].abs().max())
    parted = (tokens[0] != tokens[1]).cumsum(dim=1)[:, :-1] > 0
    differences = (logits[0] - logits[1]).abs().amax(dim=-1)  # [batch, new_tokens]
    differences[:, 1:].masked_fill_(parted, 0.0)
    difference = float(differences.max()) / max(largest, 1e-30)
    return difference, difference <= TOLERANCE.get(model.dtype, 1e-3)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
