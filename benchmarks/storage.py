"""What keys and values stored in fewer bytes cost: bytes held and error of the logits, one JSON line per policy and type.

    python benchmarks/storage.py --context 1024 --steps 64 --policies full snapkv:0.5

The model reads generated prose (or `--text FILE`), then the tokens that follow, one at a time, with each type of storage and with the
model's own; both see the same tokens. `logits_error` is the root mean square of the difference as a share of that of the logits (their
mean taken off, which softmax ignores), `largest_error` the largest difference as a share of the largest logit, `kl` the mean divergence of
the next token's distribution in nats, `same_token` the share of steps whose most likely token is the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpress import PolicyCache
from kvpress.cli_arguments import parse_budget
from kvpress.models import load_model
from kvpress.profiling.measure import prose_ids
from kvpress.row_format import KV_DTYPES


@torch.no_grad()
def follow(model: Any, ids: Tensor, context: int, cache: PolicyCache) -> Tensor:
    """Logits `[steps, vocabulary]` in fp64 of the tokens after `context`, read one at a time."""
    logits = [model(ids[:, :context], cache=cache, logits_to_keep=1).logits]
    for step in range(context, ids.shape[1]):
        logits.append(model(ids[:, step : step + 1], cache=cache).logits)
    found = torch.cat(logits[1:], dim=1)[0].double()  # the first were made before anything was stored
    return found - found.mean(dim=-1, keepdim=True)


def errors(found: Tensor, expected: Tensor) -> dict[str, float]:
    """How far logits lie from those they should be."""
    ours, theirs = found.log_softmax(-1), expected.log_softmax(-1)
    return {
        "logits_error": float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()),
        "largest_error": float((found - expected).abs().max() / expected.abs().max()),
        "kl": float((theirs.exp() * (theirs - ours)).sum(-1).mean()),
        "same_token": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--policies", nargs="+", default=["full", "snapkv:0.5"], help="name, or name:budget")
    parser.add_argument("--text", type=Path, help="a text file instead of generated prose")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    model, tokenizer = load_model(given.model)
    total = given.context + given.steps
    if given.text is None:
        ids = prose_ids(tokenizer, total, 1, seed=1)
    else:
        ids = torch.tensor([tokenizer(given.text.read_text("utf-8"))["input_ids"][:total]])
    for policy in given.policies:
        name, _, budget = policy.partition(":")
        parameters = {"budget": parse_budget(budget)} if budget else {}
        expected, whole = None, 0
        for kv_dtype in (None, *KV_DTYPES):
            cache = PolicyCache(model, name, kv_dtype=kv_dtype, **parameters)
            logits = follow(model, ids, given.context, cache)
            if expected is None:
                expected, whole = logits, cache.nbytes
            row = {"policy": policy, "kv_dtype": kv_dtype or str(model.dtype).removeprefix("torch.")}
            row |= {
                "context": given.context,
                "steps": given.steps,
                "held_bytes": cache.nbytes,
                "share": cache.nbytes / whole,
            }
            print(json.dumps(row | errors(logits, expected)), flush=True)


if __name__ == "__main__":
    main()
