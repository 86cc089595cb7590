"""One job, done in this process."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvpress.cache_argument import passed
from kvpress.demo.prose import sentences
from kvpress.profiling.context import Profile, profile
from kvpress.profiling.job import Job, policy_from

WARM_UP_TOKENS = 64
PIECE = 200  # sentences that are tokenized together


def measure(job: Job) -> dict[str, Any]:
    """Load the model, warm up, generate, and return the figures as JSON types.

    Raises:
        ModelLoadError: the model could not be read.
        ValueError: a value of the job that the model or the policy refuses.
    """
    from kvpress.models import load_model

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    model, tokenizer = load_model(job.model, dtype=job.dtype, device=job.device)
    ids = prose_ids(tokenizer, job.context, job.batch, job.seed).to(model.device)
    warm = make_cache(model, job)
    generate(model, ids[:, :WARM_UP_TOKENS], warm, 2, job.chunk_size)
    close(warm)
    del warm
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    cache = make_cache(model, job)
    with profile(model, exact_peaks=True, cuda_snapshot=job.cuda_snapshot) as found:
        generate(model, ids, cache, job.new_tokens, job.chunk_size)
    close(cache)
    return {**facts(job, model), **figures(found)}


def facts(job: Job, model: Any) -> dict[str, Any]:
    """What was measured, on what."""
    from kvpress.longbench.runner.versions import versions

    return {
        "model": job.model,
        "label": job.label,
        "policy": job.policy,
        "kv_dtype": job.kv_dtype,
        "offload": job.offload,
        "context": job.context,
        "new_tokens": job.new_tokens,
        "chunk_size": job.chunk_size,
        "seed": job.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def figures(found: Profile) -> dict[str, Any]:
    """A profile with the sums that tables and plots read."""
    cache = found.cache
    rest = {name: value for name, value in found.to_dict().items() if name != "cache"}
    return {
        **rest,
        "kv_logical_bytes": None if cache is None else cache.logical_bytes,
        "kv_held_bytes": None if cache is None else cache.held_bytes,
        "kv_full_bytes": None if cache is None else cache.full_bytes,
        "tiers": {} if cache is None else cache.tiers,
        "layers": [] if cache is None else cache.to_dict()["layers"],
    }


def make_cache(model: Any, job: Job) -> Any:
    """A fresh cache; the stock one leaves the model's attention as it is."""
    if job.policy is None:
        return DynamicCache(config=model.config)
    from kvpress.cache import PolicyCache
    from kvpress.offload import Offload

    offload = None if job.offload is None else Offload(**job.offload)
    return PolicyCache(model, policy_from(job.policy), kv_dtype=job.kv_dtype, offload=offload)


def close(cache: Any) -> None:
    """Free the tiers of an offloaded cache."""
    if getattr(cache, "tiers", None) is not None:
        cache.close()


def generate(model: Any, ids: Tensor, cache: Any, new_tokens: int, chunk_size: int | None) -> None:
    """Greedy, exactly `new_tokens` tokens."""
    chunks = {} if chunk_size is None else {"prefill_chunk_size": chunk_size}
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **passed(model, cache),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **chunks,
    )


def prose_ids(tokenizer: Any, tokens: int, batch: int, seed: int) -> Tensor:
    """Generated prose, another text in each row: `[batch, tokens]` int64."""
    rows = []
    for row in range(batch):
        stream, ids = sentences(seed + row), list[int]()
        while len(ids) < tokens:
            text = " ".join(next(stream) for _ in range(PIECE))
            ids += tokenizer(text, add_special_tokens=not ids)["input_ids"]
        rows.append(ids[:tokens])
    return torch.tensor(rows)
