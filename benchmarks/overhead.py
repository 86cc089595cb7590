"""CPU time of one layer and decoded token beside the arithmetic of attention: one JSON line per cache.

    python benchmarks/overhead.py --slots 64

Every layer of a model with many thin layers gets a token's keys and values and attends to about `--slots` slots, as a model would call it,
with one thread. Selections choose them from four times as many.

- `microseconds`: CPU time of a layer and token, from the call of `update` to the return of attention: tokens are appended, slots selected,
  attended to, observed and evicted there. The median over the steps, caches taking turns.
- `mean`: of the same, with the steps in which buffers grew.
- `kernel`: that of the compiled attention kernel alone, over as many slots.
- `bookkeeping`: `microseconds - kernel`, the overhead per layer and token. For selections it includes the arithmetic of choosing.

`stock` is `DynamicCache` with transformers' sdpa path, whose arithmetic cannot be told apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvpress import PolicyCache
from kvpress.attention import attention_forward
from kvpress.kernels.native import missing
from kvpress.kernels.native import tensors as native
from kvpress.policies import H2O, Full, Quest, SnapKV, StreamingLLM, TidalDecode, TokenSelect

LAYERS, HEADS, KV_HEADS, DIM = 30, 9, 3, 64  # of SmolLM2-135M
SCALING = DIM**-0.5
WARM_UP = 5


def kernel_microseconds(slots: int, calls: int = 2000) -> float:
    """CPU time of the compiled kernel for one row over `slots` slots."""
    query, output = torch.randn(1, HEADS, 1, DIM), torch.empty(1, HEADS, 1, DIM)
    keys, values = torch.randn(1, KV_HEADS, slots, DIM), torch.randn(1, KV_HEADS, slots, DIM)
    fields, _ = native.attention_fields(
        query, keys, values, kv_heads=KV_HEADS, scaling=SCALING, positions=None, query_positions=None, starts=None,
        lengths=None, index=None, causal=False, softcap=None, sinks=None, keys_scale=None, values_scale=None,
        output=output.data_ptr(), lse=0, weights=0, reduction=0, entries=0,
    )  # fmt: skip
    times, call = [], native.built().attention
    for _ in range(calls):
        start = time.process_time_ns()
        call(*fields)
        times.append(time.process_time_ns() - start)
    return statistics.median(times) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HEADS * DIM, intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    stock, budget = DynamicCache(config=config), given.slots
    caches: dict[str, Any] = {
        "full": PolicyCache(model, Full()),
        "streaming_llm": PolicyCache(model, StreamingLLM(budget=budget)),
        "snapkv": PolicyCache(model, SnapKV(budget=budget)),
        "h2o": PolicyCache(model, H2O(budget=budget)),
        "streaming_llm, int8": PolicyCache(model, StreamingLLM(budget=budget), kv_dtype="int8"),
    }
    parts = {
        "sinks": budget // 8,
        "local": budget // 4,
        "chunk": budget // 4,
        "top_k": budget - budget // 8 - budget // 4,
    }
    selections: dict[str, Any] = {
        "tokenselect, reused": PolicyCache(model, TokenSelect(**parts, threshold=-1)),
        "tokenselect, anew": PolicyCache(model, TokenSelect(**parts, threshold=2)),
        "tokenselect, positions kept, reused": PolicyCache(model, TokenSelect(**parts, positions="keep", threshold=-1)),
        "tokenselect, positions kept, anew": PolicyCache(model, TokenSelect(**parts, positions="keep", threshold=2)),
        "quest": PolicyCache(model, Quest(top_k=budget)),
        "tidaldecode": PolicyCache(model, TidalDecode(top_k=budget)),
    }
    steps: dict[str, Callable[[], None]] = {}
    layers = [layer.self_attn for layer in model.model.layers]
    tokens = [torch.randn(1, heads, 1, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]

    def step(cache: Any, attention: Callable[..., Any]) -> None:
        query, keys, values = tokens
        position_ids = torch.tensor([[cache.get_seq_length()]])
        for index, module in enumerate(layers):
            attention(
                module, query, *cache.update(keys, values, index), None, scaling=SCALING, position_ids=position_ids
            )

    with torch.no_grad():
        prompt = torch.randint(0, 64, (1, 4 * given.slots))
        for cache in caches.values():
            model(prompt[:, : given.slots + 8], cache=cache)
        for cache in selections.values():
            model(prompt, cache=cache)
        for index in range(LAYERS):
            stock.update(torch.randn(1, KV_HEADS, given.slots, DIM), torch.randn(1, KV_HEADS, given.slots, DIM), index)
        steps["stock"] = lambda: step(stock, sdpa_attention_forward)
        for name, cache in (caches | selections).items():
            steps[name] = lambda cache=cache: step(cache, attention_forward)
        found: dict[str, list[int]] = {name: [] for name in steps}
        for turn in range(WARM_UP + given.steps):
            for name, run in steps.items():
                start = time.process_time_ns()
                run()
                if turn >= WARM_UP:
                    found[name].append(time.process_time_ns() - start)
    kernel = kernel_microseconds(given.slots) if missing is None else None
    for name, times in found.items():
        microseconds = statistics.median(times) / LAYERS / 1e3
        row: dict[str, Any] = {"cache": name, "slots": given.slots, "microseconds": round(microseconds, 1)}
        row["mean"] = round(statistics.mean(times) / LAYERS / 1e3, 1)
        if name != "stock" and kernel is not None:
            row |= {"kernel": round(kernel, 1), "bookkeeping": round(microseconds - kernel, 1)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
