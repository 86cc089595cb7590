"""Offload: decode speed with a near tier that is too small, and peak memory against the limit.

    python benchmarks/offload.py                          # both, a few minutes
    python benchmarks/offload.py --only speed --near 0.25 0.6 --policies tokenselect quest
    python benchmarks/offload.py --only memory

JSON lines. *speed*: SmolLM2-135M (`--model`) decodes greedily over a context of `--tokens` slots, with and without offload in turn,
token by token, on the same tokens; every step's logits are compared bit for bit before it counts. The context is a text of `--read` tokens
that the model has read, its keys and values repeated (with positions="reindex" keys are stored before rotation, so a repeated text is
what they are). The near tier is a share of all keys and values, the rest lies on disk; files are not dropped from the page cache,
which is stated. The first `--warm-up` tokens, at which an index is built and the first selections are read, do not count.
Figures are medians of wall time and of the process's CPU time, background threads included, and the ratio without / with offload.

*memory*: a random model of 32 layers reads a context whose keys and values are 4 times the limit, in one piece or in chunks of 256 tokens,
and continues it by 16 tokens. Reported is how far the peak resident memory of a fresh process lies above that of another fresh process that
does the same with a cache that keeps 64 tokens, under the same selection: what the model needs itself, a prompt's activations and the keys
and values of the layer that computes included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvpress import PolicyCache
from kvpress.demo.prose import sentences
from kvpress.models import load_model
from kvpress.offload import Offload
from kvpress.policies import Full, Policy, Quest, StreamingLLM, TokenSelect

POLICIES: dict[str, Policy] = {
    "tokenselect": TokenSelect(tail=0),
    "tokenselect, int8 index": TokenSelect(tail=0, index="int8"),
    "tokenselect, int4 index": TokenSelect(tail=0, index="int4"),
    "tokenselect, int8 index, no reuse": TokenSelect(tail=0, index="int8", threshold=2),
    "tokenselect, int4 index, no reuse": TokenSelect(tail=0, index="int4", threshold=2),
    "tokenselect, threshold 0.7": TokenSelect(tail=0, threshold=0.7),
    "quest": Quest(),
}
MEMORY_POLICIES: dict[str, Policy] = {
    "full": Full(),
    "tokenselect, int8 index": TokenSelect(top_k=256, sinks=32, local=64, chunk=64, tail=2, index="int8"),
    "quest": Quest(top_k=256),
}


def text_ids(tokenizer: Any, file: Path | None, tokens: int) -> Tensor:
    """The first tokens of a text, or of generated prose, which is the same on every machine."""
    text = " ".join(islice(sentences(0), tokens // 4)) if file is None else file.read_text("utf-8")
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    return ids


def fill(cache: PolicyCache, read: list[tuple[Tensor, Tensor]], copies: int) -> None:
    """The context, `copies` times over."""
    for layer, (keys, values) in zip(cache.policy_layers, read, strict=True):
        layer.take_in(keys.repeat(1, 1, copies, 1), values.repeat(1, 1, copies, 1), None)


def speed(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_model(arguments.model)
    ids = text_ids(tokenizer, arguments.text, arguments.read)
    for name in arguments.policies:
        policy = POLICIES[name]
        first = PolicyCache(model, policy)
        with torch.no_grad():
            model(ids, cache=first, logits_to_keep=1)
        read = [(layer.keys.clone(), layer.values.clone()) for layer in first.policy_layers]
        del first
        for near in arguments.near:
            compare(model, policy, name, read, ids, near, arguments)


def compare(
    model: Any,
    policy: Policy,
    name: str,
    read: list[tuple[Tensor, Tensor]],
    ids: Tensor,
    near: float,
    arguments: argparse.Namespace,
) -> None:
    """Steps without and with offload, in turn."""
    copies = arguments.tokens // read[0][0].shape[2]
    full = copies * sum(keys.nbytes + values.nbytes for keys, values in read)
    with tempfile.TemporaryDirectory(dir=arguments.disk) as folder:
        offload = Offload(host=int(near * full), disk=folder, block=arguments.block, prefetch=arguments.prefetch)
        plain, tiered = PolicyCache(model, policy), PolicyCache(model, policy, offload=offload)
        for cache in (plain, tiered):
            fill(cache, read, copies)
        token, times = ids[:, -1:], {"without": [], "with": []}
        cpu: dict[str, list[float]] = {"without": [], "with": []}
        with torch.no_grad():
            for step in range(arguments.steps + arguments.warm_up):
                logits = []
                for kind, cache in (("without", plain), ("with", tiered)):
                    start, start_cpu = time.perf_counter(), time.process_time()
                    logits.append(model(token, cache=cache).logits)
                    if step >= arguments.warm_up:
                        times[kind].append(time.perf_counter() - start)
                        cpu[kind].append(time.process_time() - start_cpu)
                if not torch.equal(*logits):
                    raise SystemExit(f"{name}: logits differ at step {step}: no figure is printed")
                token = logits[0][:, -1:].argmax(dim=-1)
        report = tiered.report()
        row: dict[str, Any] = {
            "benchmark": "speed", "policy": name, "text": str(arguments.text or "generated prose"),
            "read": arguments.read, "tokens": arguments.tokens, "kv_bytes": full, "near_share": near,
            "block": arguments.block,
            "prefetch": arguments.prefetch, "steps": arguments.steps, "logits": "equal bit for bit", "page_cache": "not dropped",
            "selections": report.selections, "selections_reused": report.selections_reused, "load": os.getloadavg()[0],
        }  # fmt: skip
        for clock, found in (("wall", times), ("cpu", cpu)):
            medians = {kind: statistics.median(values) for kind, values in found.items()}
            row |= {f"{clock}_ms_{kind}": round(1e3 * value, 1) for kind, value in medians.items()}
            row[f"{clock}_speed_kept"] = round(medians["without"] / medians["with"], 3)
        row["tiers"] = {tier.tier: {"limit": tier.limit, "peak": tier.peak_nbytes, "hits": tier.hits, "bytes_out": tier.bytes_out,
                                    "stall_seconds": round(tier.stall_seconds, 2)} for tier in report.tiers}  # fmt: skip
        print(json.dumps(row), flush=True)
        tiered.close()


def peak() -> int:
    """Peak resident bytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory_child(kind: str, own: bool, chunk: int, limit: int) -> None:
    """Read and continue a context under the policy `kind`, with offload or in the model's `own` memory alone; prints what it took."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=32, num_attention_heads=8, num_key_value_heads=8,
        head_dim=64, max_position_embeddings=1 << 16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = 4 * limit // (32 * 8 * 64 * 2 * 4)
    ids = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(0))
    prompt = tokens - 16
    pieces = [*ids[:, :prompt].split(chunk, dim=1), *ids[:, prompt:].split(1, dim=1)]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        offload = Offload(host=limit, disk=folder, block=64)
        given = MEMORY_POLICIES[kind]
        few = [StreamingLLM(budget=64), *([] if isinstance(given, Full) else [given])]
        cache = PolicyCache(model, few) if own else PolicyCache(model, given, offload=offload)
        for piece in pieces:
            model(piece, cache=cache, logits_to_keep=1)
        report = cache.report()
        found = {
            "peak": peak(),
            "kv_bytes": report.full_nbytes,
            "tier_peaks": {t.tier: t.peak_nbytes for t in report.tiers},
        }
        cache.close()
    print(json.dumps(found))


def memory(arguments: argparse.Namespace) -> None:
    limit = arguments.limit

    def measured(kind: str, chunk: int, *more: str) -> Any:
        options = (
            "--child",
            kind,
            *more,
            "--chunk",
            str(chunk),
            "--limit",
            str(limit),
            "--threads",
            str(arguments.threads),
        )
        out = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE).stdout
        return json.loads(out)

    for chunk in (1 << 30, 256):
        for kind in MEMORY_POLICIES:
            own, found = measured(kind, chunk, "--own"), measured(kind, chunk)
            row = {
                "benchmark": "memory", "policy": kind, "prompt": "one piece" if chunk == 1 << 30 else f"chunks of {chunk}",
                "kv_bytes": found["kv_bytes"], "limit": limit, "times_the_limit": found["kv_bytes"] / limit, "peak_own": own["peak"],
                "peak_with_offload": found["peak"], "above_own_over_limit": round((found["peak"] - own["peak"]) / limit, 3),
                "tier_peaks": found["tier_peaks"],
            }  # fmt: skip
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=32_768, help="slots of the context, a multiple of --read")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument(
        "--near", type=float, nargs="+", default=[0.25], help="share of the keys and values that the near tier may hold"
    )
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--prefetch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--read", type=int, default=2048, help="tokens of text, repeated to make the context")
    parser.add_argument("--text", type=Path, help="a text file; generated prose without it")
    parser.add_argument("--disk", default=None, help="directory for the files")
    parser.add_argument("--limit", type=int, default=64 << 20, help="of the memory run, bytes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--own", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        memory_child(arguments.child, arguments.own, arguments.chunk, arguments.limit)
        return
    if arguments.only != "memory":
        speed(arguments)
    if arguments.only != "speed":
        memory(arguments)


if __name__ == "__main__":
    main()
