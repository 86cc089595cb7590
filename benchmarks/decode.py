"""Time per decoded token against `DynamicCache` with sdpa, in the same run: one JSON line per cache and context.

    python benchmarks/decode.py --contexts 8192 32768 --steps 15
    python benchmarks/decode.py --device cuda --dtype bfloat16 --shape llama-3-8b --contexts 32768 --budget 2048

The model has the shape of SmolLM2-135M, or of Llama-3-8B, with random weights (time does not depend on them); contexts are filled with
random keys and values. Stock and ours take turns token by token, so that a busy machine slows both; figures are medians and their ratio.
With one thread the process's own CPU time is taken, which a busy machine disturbs less. On a GPU a token is timed from the call of the
model until the device has done it.
A selection reads keys and values where they lie among those of the whole context; `reused` is the share of its selections that were an
earlier one used again, which random weights say nothing about: TokenSelect is therefore also timed with every selection reused, and with
none.
`share_of_limit` compares with the stock cache of 256 tokens, stepped in the same turns: no cache is faster than the rest of the model.
A cache whose logits must equal the stock's is checked first, and its times are not printed when they differ.
With `--kv-dtype` our caches store keys and values in fewer bytes; the stock ones do not.
`kvpress bench` does the same with a model of one's own.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Collection

import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM

from kvpress import PolicyCache
from kvpress.policies import Full, Quest, SnapKV, StreamingLLM, TidalDecode, TokenSelect
from kvpress.policies.base import Policy
from kvpress.profiling.turns import TOLERANCE, decode_seconds, logits_difference, random_cache, ratios
from kvpress.row_format import KV_DTYPES

FP32_TOLERANCE = 1e-5  # of the largest logit
SHORT = 256  # tokens of the stock cache that serves as the limit


SHAPES: dict[str, dict[str, int | bool]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


def random_model(
    shape: str, layers: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Random weights in one of `SHAPES`; `layers` of them, where that is given."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=262_144, dtype=dtype, **SHAPES[shape])
    if layers is not None:
        config.num_hidden_layers = layers
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def all_policies(budget: int) -> dict[str, Policy]:
    """Policies that keep or attend to `budget` tokens, and the one that keeps all."""
    parts = {
        "sinks": budget // 8,
        "local": budget // 4,
        "chunk": budget // 4,
        "top_k": budget - budget // 8 - budget // 4,
    }
    return {
        "full": Full(),
        "streaming_llm": StreamingLLM(budget=budget),
        "snapkv": SnapKV(budget=budget),
        "tokenselect": TokenSelect(**parts),
        "tokenselect, reused": TokenSelect(**parts, threshold=-1),
        "tokenselect, anew": TokenSelect(**parts, threshold=2),
        "tokenselect, int8 index": TokenSelect(**parts, index="int8"),
        "tokenselect, int8 index, anew": TokenSelect(**parts, index="int8", threshold=2),
        "tokenselect, int4 index": TokenSelect(**parts, index="int4"),
        "tokenselect, int4 index, anew": TokenSelect(**parts, index="int4", threshold=2),
        "quest": Quest(top_k=budget),
        "tidaldecode": TidalDecode(top_k=budget),
    }


def reused_share(cache: PolicyCache) -> float:
    """Of the selections of all layers and tokens, those that reused an earlier one."""
    selectors = [layer.selector for layer in cache.policy_layers if layer.selector is not None]
    hits, misses = sum(each.hits for each in selectors), sum(each.misses for each in selectors)
    return hits / max(hits + misses, 1)


def measure(
    model: LlamaForCausalLM,
    tokens: int,
    budget: int,
    steps: int,
    emit: Callable[[dict[str, object]], None],
    only: Collection[str] = (),
    kv_dtype: str | None = None,
) -> None:
    """Emit one row per cache at one context; ours store keys and values as `kv_dtype`."""
    policies = {name: policy for name, policy in all_policies(budget).items() if not only or name in only}
    stock = random_cache(model, tokens)
    caches: dict[str, Cache] = {"stock": stock, "stock_short": random_cache(model, SHORT)}
    ours: dict[str, PolicyCache] = {
        name: PolicyCache.from_cache(model, policies[name], stock, kv_dtype=kv_dtype) for name in policies
    }
    found = ratios(decode_seconds(model, caches | ours, torch.tensor([[7]], device=model.device), steps))
    limit = found["stock_short"]["token_milliseconds"]
    for name, figures in found.items():
        row: dict[str, object] = {
            "cache": name,
            "context": SHORT if name == "stock_short" else tokens,
            "budget": None if name in ("stock", "stock_short", "full") else budget,
            "ms_per_token": round(figures["token_milliseconds"], 2),
            "speedup": round(figures["speedup"], 3),
            "share_of_limit": round(figures["token_milliseconds"] / limit, 3),
            "steps": steps,
        }
        if kv_dtype is not None and name in ours:
            row["kv_dtype"] = kv_dtype
        if name in ours and ours[name].policies.selection is not None:
            row["reused"] = round(reused_share(ours[name]), 3)
        emit(row)


def emit(row: dict[str, object]) -> None:
    """Print a row at once."""
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--no-cudnn",
        action="store_true",
        help="without cuDNN's attention, which sdpa prefers on some GPUs and plans anew at every length",
    )
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", default=[], choices=list(all_policies(1024)), help="of the policies, these"
    )
    parser.add_argument(
        "--kv-dtype", choices=KV_DTYPES, help="how our caches store keys and values; default: in the model's type"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.enable_cudnn_sdp(not arguments.no_cudnn)
    model = random_model(arguments.shape, arguments.layers, arguments.device, getattr(torch, arguments.dtype))
    with torch.no_grad():
        tolerance = FP32_TOLERANCE if model.dtype == torch.float32 else TOLERANCE[model.dtype]
        ids = torch.randint(0, 49152, (1, 300), generator=torch.Generator().manual_seed(2)).to(model.device)
        agree = logits_difference(model, Full(), ids)[0] <= tolerance
        facts = {"shape": arguments.shape, "dtype": arguments.dtype, "threads": arguments.threads}
        facts |= {"cudnn": not arguments.no_cudnn} if arguments.device != "cpu" else {}
        where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
        load = os.getloadavg()[0]
        print(json.dumps({"check": "full equals stock", "agree": agree, "device": where, "load": load} | facts))
        if not agree:
            raise SystemExit("logits differ: no figure is printed")
        for tokens in arguments.contexts:
            measure(model, tokens, arguments.budget, arguments.steps, emit, arguments.only, arguments.kv_dtype)


if __name__ == "__main__":
    main()
