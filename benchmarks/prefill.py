"""Time and peak memory of a prompt against `DynamicCache` with sdpa: one JSON line per cache.

    python benchmarks/prefill.py --tokens 8192 --policies snapkv h2o keyformer adakv

The model has the shape of SmolLM2-135M with random weights. Times: stock and ours take turns in one process, `--rounds` of them; ratios
of medians. Peaks: each cache in a fresh process, the most resident memory during the prompt above what was resident before it. A policy
whose logits differ from the stock cache's (a prompt is attended to whole before anything is evicted) gets no figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from decode import FP32_TOLERANCE, random_model
from transformers import DynamicCache

from kvpress import PolicyCache
from kvpress.profiling.peak import resident_meter


def prefill(model: Any, ids: torch.Tensor, policy: str, budget: int) -> tuple[Any, torch.Tensor, float]:
    """The filled cache, the last token's logits, and seconds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    if policy == "stock":
        model.set_attn_implementation("sdpa")
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = PolicyCache(model, policy, **({} if policy == "full" else {"budget": budget}))
    start = clock()
    logits = model(ids, cache=cache, logits_to_keep=1).logits
    return cache, logits, clock() - start


def peak(arguments: argparse.Namespace, ids: torch.Tensor) -> dict[str, Any]:
    """In a process of its own: megabytes above those resident before the prompt."""
    model = random_model("smollm2-135m", arguments.layers)
    prefill(model, ids[:, :64], arguments.only, 48)
    meter = resident_meter(exact=True)
    meter.start()
    cache, _, _ = prefill(model, ids, arguments.only, arguments.budget)
    meter.stop()
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"peak_MB": round(((meter.peak or 0) - meter.before) / 1e6, 1), "cache_MB": round(held / 1e6, 1)}


def peak_in_child(arguments: argparse.Namespace, policy: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--only", policy, "--threads", str(arguments.threads)]
    for name in ("tokens", "budget", "layers"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed buffers leave the process at once
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=30, help="for the peaks")
    parser.add_argument("--timed-layers", type=int, default=8, help="for the times, which are per layer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--policies", nargs="+", default=["full", "snapkv", "h2o", "keyformer", "adakv"])
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ids = torch.randint(0, 49152, (1, arguments.tokens), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        if arguments.only:
            print(json.dumps(peak(arguments, ids)))
            return
        names = ["stock", *arguments.policies]
        model = random_model("smollm2-135m", arguments.timed_layers)
        times: dict[str, list[float]] = {name: [] for name in names}
        wrong = set()
        for turn in range(arguments.rounds):
            for name in names:
                _, logits, seconds = prefill(model, ids, name, arguments.budget)
                times[name].append(seconds)
                if name == "stock" and turn == 0:
                    right = logits
                elif (logits - right).abs().max() > FP32_TOLERANCE:
                    wrong.add(name)
        base = statistics.median(times["stock"])
        stock_peak: dict[str, Any] = {}
        for name in names:
            row: dict[str, Any] = {"cache": name, "tokens": arguments.tokens, "threads": arguments.threads}
            if name in wrong:
                print(json.dumps(row | {"check": "logits differ: no figure is printed"}), flush=True)
                continue
            memory = peak_in_child(arguments, name)
            stock_peak = stock_peak or memory
            row |= {"seconds": round(statistics.median(times[name]), 3)}
            row |= {"time_ratio": round(statistics.median(times[name]) / base, 3), **memory}
            print(json.dumps(row | {"peak_ratio": round(memory["peak_MB"] / stock_peak["peak_MB"], 3)}), flush=True)


if __name__ == "__main__":
    main()
