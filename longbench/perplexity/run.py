"""A perplexity run: windows by methods, one result line each, resumed like any other run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..runner.method import FULL, Method
from ..runner.progress import progress_bar
from ..runner.store import ResultStore
from ..runner.totals import tier_means
from .divergence import TokenScores, score_tokens
from .windows import Window

BUCKETS = 4


def run_perplexity(
    model: PreTrainedModel,
    windows: Sequence[Window],
    methods: Sequence[Method],
    store: ResultStore,
    *,
    chunk_size: int = 1,
    prefill_chunk_size: int | None = None,
    methods_at_once: int = 1,
    together: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Score every window under every method that the store has no result for, and write the totals.

    The full cache is read beside the methods in every window, because the divergence is measured against it;
    its own result is written too.

    Args:
        chunk_size, prefill_chunk_size, together: as of `score_tokens`.
        methods_at_once: methods whose caches are held at once.
    """
    chosen = [FULL, *(method for method in methods if method != FULL)]
    done = {method.label: store.done(method.label) for method in chosen}
    finished = sum(all(window.name in done[method.label] for method in chosen) for window in windows)
    with progress_bar(len(windows), done=finished, enabled=progress) as advance:
        for window in windows:
            for start in range(0, len(chosen), methods_at_once):
                group = chosen[start : start + methods_at_once]
                pending = [method for method in group if window.name not in done[method.label]]
                if pending:
                    scores = score_tokens(
                        model,
                        group if together else pending,  # what rows of a batch give depends on their number
                        window,
                        chunk_size=chunk_size,
                        prefill_chunk_size=prefill_chunk_size,
                        together=together,
                    )
                    for method in pending:
                        store.append(_row(method, window, scores[method.label]))
            if any(window.name not in done[method.label] for method in chosen):
                advance(window.name)
    totals = perplexity_totals(store.rows)
    store.write_skipped([])
    store.write_totals(totals)
    return totals


def _row(method: Method, window: Window, scores: TokenScores) -> dict[str, Any]:
    return {
        "sample": window.name,
        "task": "perplexity",
        "method": method.label,
        "policy": method.policy,
        "budget": method.budget,
        "options": dict(method.options),
        "offload": None if method.offload is None else dict(method.offload),
        "prefix_tokens": len(window.prefix_ids),
        "tokens": len(window.next_ids),
        "nll": scores.nll.sum().item(),
        "kl": scores.kl.sum().item(),
        "agreement": scores.agreement.sum().item(),
        "cache_bytes": scores.cache_bytes,
        "full_bytes": scores.full_bytes,
        "tiers": dict(scores.tiers),
        "buckets": _buckets(scores),
    }


def _buckets(scores: TokenScores) -> list[dict[str, float]]:
    """The continuation in four equal stretches: how fast the loss grows or heals with distance."""
    parts = zip(*(torch.tensor_split(values, BUCKETS) for values in (scores.nll, scores.kl)), strict=True)
    return [{"tokens": len(nll), "nll": nll.sum().item(), "kl": kl.sum().item()} for nll, kl in parts]


def perplexity_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Perplexity, its ratio to the full cache's, mean KL divergence (nats) and agreement (percent), by method."""
    methods: dict[str, Any] = {}
    for label in sorted({row["method"] for row in rows}):
        own = sorted((row for row in rows if row["method"] == label), key=lambda row: row["sample"])
        same = {row["sample"] for row in own}
        full = [row for row in rows if row["method"] == "full" and row["sample"] in same]
        tokens = sum(row["tokens"] for row in own)
        mean = math.fsum(row["nll"] for row in own) / tokens
        entry = {
            "windows": len(own),
            "tokens": tokens,
            "perplexity": round(math.exp(mean), 6),
            "kl": round(math.fsum(row["kl"] for row in own) / tokens, 9),
            "agreement": round(100 * math.fsum(row["agreement"] for row in own) / tokens, 2),
            "memory_share": round(sum(row["cache_bytes"] / row["full_bytes"] for row in own) / len(own), 4),
        }
        entry |= tier_means(own)
        if len(full) == len(own):
            entry["ratio"] = round(math.exp(mean - math.fsum(row["nll"] for row in full) / tokens), 6)
        methods[label] = entry
    return {"methods": methods, "samples": len(rows), "skipped": 0}
