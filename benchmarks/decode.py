"""Time per decoded token against `DynamicCache` with sdpa, in the same run: one JSON line per cache and context.

    python benchmarks/decode.py --contexts 8192 32768 --steps 15

The model has the shape of SmolLM2-135M with random weights (time does not depend on them); contexts are filled with random keys and
values. Stock and ours take turns token by token, so that a busy machine slows both; figures are medians and their ratio. With
one thread the process's own CPU time is taken, which a busy machine disturbs less.
`share_of_limit` compares with the stock cache of 256 tokens, stepped in the same turns: no cache is faster than the rest of the model.
A cache whose logits must equal the stock's is checked first, and its times are not printed when they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvpress import PolicyCache
from kvpress.policies import Full, Policy, SnapKV, StreamingLLM

TOLERANCE = 1e-4
SHORT = 256  # tokens of the stock cache that serves as the limit


def smollm2_shape(layers: int) -> LlamaForCausalLM:
    """Random weights in the shape of SmolLM2-135M."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def filled_cache(model: LlamaForCausalLM, tokens: int) -> DynamicCache:
    """A stock cache of `tokens` random tokens."""
    generator = torch.Generator().manual_seed(1)
    cache = DynamicCache(config=model.config)
    shape = (1, model.config.num_key_value_heads, tokens, 64)
    for layer in range(model.config.num_hidden_layers):
        cache.update(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), layer)
    return cache


def decode_times(model: LlamaForCausalLM, caches: dict[str, object], steps: int) -> dict[str, list[float]]:
    """Seconds per token of each cache, taking turns; `"stock"` and `"stock_short"` run under sdpa."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in caches}
    token = torch.tensor([[7]])
    for step in range(steps + 3):
        for name, cache in caches.items():
            model.set_attn_implementation("sdpa" if name.startswith("stock") else "kvpress")
            start = clock()
            model(token, past_key_values=cache)
            if step >= 3:
                times[name].append(clock() - start)
    return times


def logits_agree(model: LlamaForCausalLM, policy: Policy) -> bool:
    """Whether greedy logits after 300 random tokens equal the stock cache's."""
    ids = torch.randint(0, 49152, (1, 300), generator=torch.Generator().manual_seed(2))
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    model.set_attn_implementation("sdpa")
    stock = model.generate(ids, **arguments)
    ours = model.generate(ids, past_key_values=PolicyCache(model, policy), **arguments)
    return max((a - b).abs().max().item() for a, b in zip(stock.logits, ours.logits, strict=True)) <= TOLERANCE


def measure(
    model: LlamaForCausalLM, tokens: int, budget: int, steps: int, emit: Callable[[dict[str, object]], None]
) -> None:
    """Emit one row per cache at one context."""
    policies = {"full": Full(), "streaming_llm": StreamingLLM(budget=budget), "snapkv": SnapKV(budget=budget)}
    stock = filled_cache(model, tokens)
    caches: dict[str, object] = {"stock": stock, "stock_short": filled_cache(model, SHORT)}
    for name, policy in policies.items():
        caches[name] = PolicyCache.from_cache(model, policy, stock)
    times = decode_times(model, caches, steps)
    base, limit = statistics.median(times["stock"]), statistics.median(times["stock_short"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        row: dict[str, object] = {
            "cache": name,
            "context": SHORT if name == "stock_short" else tokens,
            "budget": budget if name in ("streaming_llm", "snapkv") else None,
            "ms_per_token": round(1e3 * median, 2),
            "speedup": round(base / median, 3),
            "share_of_limit": round(median / limit, 3),
            "steps": steps,
        }
        emit(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = smollm2_shape(arguments.layers)
    with torch.no_grad():
        agree = logits_agree(model, Full())
        print(
            json.dumps(
                {"check": "full equals stock", "agree": agree, "threads": arguments.threads, "load": os.getloadavg()[0]}
            )
        )
        if not agree:
            raise SystemExit("logits differ: no figure is printed")
        for tokens in arguments.contexts:
            measure(model, tokens, arguments.budget, arguments.steps, lambda row: print(json.dumps(row), flush=True))


if __name__ == "__main__":
    main()
