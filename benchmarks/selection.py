"""Time of attention that selects, against transformers' sdpa path over the whole context, one layer of Llama-3-8B's shape.

    python benchmarks/selection.py                       # decode and a chunk at 131,072 tokens: about 5 minutes on one core
    python benchmarks/selection.py --contexts 32768 131072 524288 --skip-chunk --steps 3 --ways keep   # 10 GB of memory

JSON lines. A layer of 32 query heads, 8 KV heads and 128 dims reads a context of random keys, in this process, on the same tensors; what
is timed is attention alone, selection included, projections excluded, and the peer is spared its `torch.cat`. Ways alternate step by step,
figures are medians and ratios of medians. With one thread the process's own CPU time is taken, which a busy machine disturbs less. Before
anything is timed each way is compared with plain fp64 formulas; a difference ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvpress import PolicyCache
from kvpress.attention import attention_forward
from kvpress.policies import Policy, Quest, TokenSelect

QUERY_HEADS, KV_HEADS, DIM = 32, 8, 128


class Layer:
    """One layer whose cache holds a context of random keys and values."""

    def __init__(self, model: LlamaForCausalLM, policy: Policy, tokens: int, dtype: torch.dtype) -> None:
        self.module = model.model.layers[0].self_attn
        self.cache = PolicyCache(model, policy)
        self.layer = self.cache.policy_layers[0]
        generator = torch.Generator().manual_seed(0)
        keys, values = (torch.randn(1, KV_HEADS, tokens, DIM, generator=generator).to(dtype) for _ in range(2))
        self.layer.take_in(keys, values, None)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append and attend, as the model's attention module does."""
        rows = query.shape[2]
        ids = torch.arange(self.layer.seen, self.layer.seen + rows)[None]
        keys, values = self.cache.update(key, value, 0)
        return attention_forward(self.module, query, keys, values, None, DIM**-0.5, position_ids=ids)[0]

    def sdpa(self, query: Tensor, rows: int) -> Tensor:
        """The same rows over the whole context."""
        keys, values = self.layer.keys, self.layer.values
        mask = None
        if rows > 1:
            slots = torch.arange(keys.shape[2])
            mask = (slots[None] <= slots[-rows:, None])[None, None]
        return sdpa_attention_forward(self.module, query, keys, values, mask, scaling=DIM**-0.5)[0]


def rows_of(count: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, QUERY_HEADS), (1, KV_HEADS), (1, KV_HEADS))
    query, key, value = (torch.randn(*shape, count, DIM, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def check(model: LlamaForCausalLM, dtype: torch.dtype) -> float:
    """Largest difference from fp64 formulas: a miss, a hit, a chunk, and sdpa over everything."""
    worst = 0.0
    for threshold, count in ((2, 1), (-1, 1), (2, 48)):
        policy = TokenSelect(top_k=64, sinks=8, local=64, chunk=64, tail=0, threshold=threshold, positions="keep")
        layer = Layer(model, policy, 2000, dtype)
        for seed in (1, 2):
            query, key, value = rows_of(count, dtype, seed)
            output = layer.attend(query, key, value)[0].transpose(0, 1).double()
            keys, values = layer.layer.keys[0].double(), layer.layer.values[0].double()
            total = keys.shape[1]
            if seed == 1 or threshold == 2:
                votes = torch.zeros(total - 64 - 8, dtype=torch.float64)
                for head in range(QUERY_HEADS):
                    votes += (keys[head // 4, 8 : total - 64] @ query[0, head].double().mean(0)).softmax(0)
                chosen = votes.topk(64).indices + 8
            seen = torch.cat([torch.arange(8), chosen.sort().values, torch.arange(total - 64, total)])
            for head in range(QUERY_HEADS):
                scores = query[0, head].double() @ keys[head // 4, seen].T * DIM**-0.5
                scores = scores.masked_fill(seen[None] > torch.arange(total - count, total)[:, None], -torch.inf)
                worst = max(worst, float((scores.softmax(-1) @ values[head // 4, seen] - output[head]).abs().max()))
            expected = layer.sdpa(query, count)
            roomy = Layer(model, TokenSelect(top_k=9000, positions="keep", chunk=64), 2000, dtype)
            if seed == 1:
                worst = max(worst, float((roomy.attend(query, key, value) - expected).abs().max()))
    return worst


def timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[131_072], help="tokens held")
    parser.add_argument("--steps", type=int, default=7, help="decode steps of each way")
    parser.add_argument("--chunks", type=int, default=2, help="512-token chunks of each way")
    parser.add_argument("--ways", nargs="+", default=["keep", "reindex", "quest"], choices=["keep", "reindex", "quest"])
    parser.add_argument("--skip-chunk", action="store_true")
    parser.add_argument("--skip-decode", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    dtype = getattr(torch, arguments.dtype)
    config = LlamaConfig(
        vocab_size=8, hidden_size=QUERY_HEADS * DIM, intermediate_size=8, num_hidden_layers=1, head_dim=DIM,
        num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=1 << 20,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        worst = check(model, dtype)
        agree = worst < (1e-4 if dtype == torch.float32 else 3e-2)
        facts = {"check": "fp64 formulas", "largest_difference": worst, "agree": agree}
        print(
            json.dumps({**facts, "threads": arguments.threads, "clock": clock.__name__, "load": os.getloadavg()[0]}),
            flush=True,
        )
        if not agree:
            raise SystemExit("outputs differ from the formulas: no figure is printed")
        for tokens in arguments.contexts:
            measure(model, tokens, arguments, clock, dtype)


def measure(
    model: LlamaForCausalLM, tokens: int, arguments: argparse.Namespace, clock: Callable[[], float], dtype: torch.dtype
) -> None:
    """Rows of one context length."""
    ways: dict[str, Policy] = {
        "keep": TokenSelect(positions="keep", tail=0),
        "reindex": TokenSelect(tail=0),
        "quest": Quest(skip_layers=0),
    }
    facts: dict[str, object] = {"context": tokens, "dtype": arguments.dtype}
    for name in [] if arguments.skip_decode else arguments.ways:
        decode(Layer(model, ways[name], tokens, dtype), name, arguments.steps, clock, facts)
    if arguments.skip_chunk:
        return
    base = None
    for name, tail in (("keep", 0), ("reindex", 0), ("reindex", 32)):
        policy = TokenSelect(positions=name, tail=tail)
        base = chunk(Layer(model, policy, tokens, dtype), policy, arguments.chunks, clock, facts, base)


def decode(layer: Layer, name: str, steps: int, clock: Callable[[], float], facts: dict[str, object]) -> None:
    """Single tokens: a selection miss, a hit, and sdpa, in turn; the first step warms up."""
    selector = layer.layer.selector
    if selector is None:
        raise RuntimeError("the layer has no selection")
    times: dict[str, list[float]] = {"sdpa": [], "miss": [], "hit": []}
    for step in range(steps + 1):
        query, key, value = rows_of(1, layer.layer.keys.dtype, step)
        if name != "quest":
            selector.rearrange()  # nothing to reuse; the next call with the same query reuses
        for kind in ("miss", "hit") if name != "quest" else ("miss",):
            before = selector.hits
            times[kind].append(timed(partial(layer.attend, query, key, value), clock))
            if (selector.hits > before) != (kind == "hit"):
                raise RuntimeError(f"the selection cache did not give a {kind}")
        times["sdpa"].append(timed(partial(layer.sdpa, query, 1), clock))
    base = statistics.median(times["sdpa"][1:])
    for kind, seconds in times.items():
        if seconds:
            median = statistics.median(seconds[1:])
            way = "sdpa" if kind == "sdpa" else f"quest, {kind}" if name == "quest" else f"tokenselect {name}, {kind}"
            row = {"phase": "decode", "way": way, **facts, "ms": round(1e3 * median, 3)}
            print(json.dumps({**row, "speedup": round(base / median, 2)}), flush=True)


def chunk(
    layer: Layer,
    policy: TokenSelect,
    count: int,
    clock: Callable[[], float],
    facts: dict[str, object],
    base: float | None,
) -> float:
    """Chunks of 512 tokens; the peer is timed once for all ways. Returns its median."""
    own, peer = [], []
    for step in range(count):
        query, key, value = rows_of(512, layer.layer.keys.dtype, step)
        own.append(timed(partial(layer.attend, query, key, value), clock))
        if base is None:
            peer.append(timed(partial(layer.sdpa, query, 512), clock))
    if base is None:
        base = statistics.median(peer)
        print(json.dumps({"phase": "chunk of 512", "way": "sdpa", **facts, "ms": round(1e3 * base, 1)}), flush=True)
    median = statistics.median(own)
    way = f"tokenselect {policy.positions}, tail={policy.tail}"
    row = {"phase": "chunk of 512", "way": way, **facts, "ms": round(1e3 * median, 1)}
    print(json.dumps({**row, "speedup": round(base / median, 2)}), flush=True)
    return base


if __name__ == "__main__":
    main()
