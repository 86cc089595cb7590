"""Decoding of a model with chosen policies against its stock cache, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from kvpress.cache import PolicyCache
from kvpress.cache_argument import passed
from kvpress.offload import Offload, TierError
from kvpress.policies import Full
from kvpress.profiling.cache_bytes import cache_bytes
from kvpress.profiling.candidates import Candidate
from kvpress.profiling.measure import close, prose_ids
from kvpress.profiling.turns import STOCK, attention_of, decode_seconds, logits_difference, random_cache, ratios

FILLS = ("random", "prompt")
CHECK_TOKENS = 300
Row = dict[str, Any]


def check(model: PreTrainedModel, tokenizer: Any) -> Row:
    """Whether the `full` policy gives the stock cache's logits: `{"difference": share of the largest logit, "agree": …}`."""
    ids = prose_ids(tokenizer, CHECK_TOKENS, 1, seed=0).to(model.device)
    difference, agree = logits_difference(model, Full(), ids)
    return {"difference": difference, "agree": agree}


def bench(
    model: PreTrainedModel,
    tokenizer: Any,
    candidates: Sequence[Candidate],
    context: int,
    *,
    batch: int = 1,
    steps: int = 15,
    fill: str = "random",
    offload: Offload | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """One row a cache at one context: median milliseconds per step, speed against the stock cache, bytes held, and bytes in each tier.

    Args:
        fill: `"random"` keys and values, taken over from one stock cache (time does not depend on them), or `"prompt"`: every cache reads
            generated prose.
        offload: tiers of each policy's cache; the limits are of one cache, and all are held at once.
        advance: called with the label of each cache that was filled.

    Raises:
        ValueError: an unknown `fill`, or a model that `"random"` cannot fill.
        TierError: a tier that fails while tokens are decoded.
    """
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {list(FILLS)}, got {fill!r}")
    ids = prose_ids(tokenizer, context, batch, seed=1).to(model.device)
    stock: Cache = random_cache(model, context, batch) if fill == "random" else DynamicCache(config=model.config)
    caches: dict[str, Cache] = {STOCK: stock}
    errors: dict[str, str] = {}
    with torch.no_grad(), attention_of(model) as use_stock:
        if fill == "prompt":
            use_stock(True)
            model(ids, **passed(model, stock), use_cache=True, logits_to_keep=1)
        advance(STOCK)
        for candidate in candidates:
            policy = candidate.policy(context)
            if policy is None:
                continue
            use_stock(False)
            how: dict[str, Any] = {"kv_dtype": candidate.kv_dtype, "offload": offload}
            try:
                if fill == "random":
                    cache = PolicyCache.from_cache(model, policy, stock, **how)
                else:
                    cache = PolicyCache(model, policy, **how)
                    model(ids, **passed(model, cache), use_cache=True, logits_to_keep=1)
                caches[candidate.label] = cache
            except ValueError as error:
                errors[candidate.label] = str(error) + (" (or use --fill prompt)" if fill == "random" else "")
            except TierError as error:
                errors[candidate.label] = str(error)
            advance(candidate.label)
    found = ratios(decode_seconds(model, caches, ids[:, -1:], steps))
    rows = []
    for label in (STOCK, *(candidate.label for candidate in candidates if candidate.label != STOCK)):
        row: Row = {"label": label, "context": context, "batch": batch, "steps": steps, "fill": fill}
        if label in errors:
            row["error"] = errors[label]
        else:
            held = cache_bytes(caches[label])
            row |= {**found[label], "kv_held_bytes": held.held_bytes, "tiers": held.tiers}
        rows.append(row)
    for each in caches.values():
        close(each)
    return rows
