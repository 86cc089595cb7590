"""Every kernel against its peers in the same run: one JSON line per operation, shape, storage type and implementation.

    python benchmarks/kernels.py --tokens 32768 --threads 2
    python benchmarks/kernels.py --tokens 131072 --operations decode selected vote --flex
    python benchmarks/kernels.py --tokens 131072 --device cuda --dtype bfloat16

A case is timed only after its result has been compared with the reference in fp64, within twice the error of the reference
in fp32 (`kvpress.testing.slots_oracle.error_budget`). Implementations take turns call by call, so that a busy machine slows
all alike; figures are medians, `ratio` is the peer's median over ours. `read_share` is the bytes that must be read over the
time, as a share of the read bandwidth: that of summing memory far larger than the caches, which takes its turn with the others.
With one thread the process's CPU time is taken. On a GPU, where the Triton kernels run, it is the device's time: calls are captured in a
graph, so that what their launch costs the host is not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvpress.kernels.attention import attend, attend_with_weights
from kvpress.kernels.attention.prepared import PreparedAttention
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.choosing import best_slots, listed_slots
from kvpress.kernels.choosing.prepared import PreparedVote
from kvpress.kernels.compaction import compact
from kvpress.kernels.eviction import RowWriter, weakest
from kvpress.kernels.head_vote import head_vote
from kvpress.kernels.pages import page_bounds, page_scores
from kvpress.kernels.rotation import rotate
from kvpress.row_format import Int8Rows
from kvpress.testing.slots_oracle import assert_within_budget

SHAPES = {"llama-3-8b": (32, 8, 128), "smollm2-135m": (9, 3, 64)}
SINKS, LOCAL = 128, 512  # of the selected, those that TokenSelect always attends to
SELECTED, CHUNK, WINDOW, PAGE, GATED = 2048, 512, 32, 16, 300
Call = Callable[[], Any]


@dataclass
class Case:
    """One operation on one set of tensors: calls by name (the first is ours), and the bytes that must be read."""

    operation: str
    calls: dict[str, Call]
    bytes: int
    storage: str = "float32"
    notes: dict[str, Any] = field(default_factory=dict)
    check: Callable[[], None] = field(kw_only=True)


def size(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def kernel_of(tensor: Tensor) -> str:
    """The compiled implementation for where a tensor lies."""
    return "triton" if tensor.is_cuda else "native"


def gate(ours: Callable[..., Any], *tensors: Tensor, **options: Any) -> Callable[[], None]:
    """The check of a result: the kernel of this device against the reference in fp64."""

    def check() -> None:
        wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
        exact, low = ours(*wide, impl="reference", **options), ours(*tensors, impl="reference", **options)
        found = ours(*tensors, impl=kernel_of(tensors[0]), **options)
        for triple in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, low, exact)), strict=True):
            assert_within_budget(*triple)

    return check


def same(ours: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], None]:
    """The check of a result that involves no rounding: the kernel equals the reference bit for bit."""

    def check() -> None:
        first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        found, wanted = (ours(*arguments, impl=name, **options) for name in (kernel_of(first), "reference"))
        if not all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)):
            raise AssertionError("results differ")

    return check


def cases(shape: str, tokens: int, prompt: int, flex: bool, dtype: torch.dtype) -> Iterator[Case]:
    """Every operation at one shape; tensors are made on torch's default device."""
    query_heads, kv_heads, dim = SHAPES[shape]
    group, scaling = query_heads // kv_heads, dim**-0.5
    query = torch.randn(1, query_heads, 1, dim, dtype=dtype)
    keys, values = torch.randn(2, 1, kv_heads, tokens, dim, dtype=dtype)
    kernel, storage = kernel_of(query), str(dtype).removeprefix("torch.")
    module = SimpleNamespace(num_key_value_groups=group, is_causal=True, training=False)

    def transformers_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Call:
        return lambda: sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)  # type: ignore[arg-type]

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Call:
        return lambda: scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True)

    peers = {"transformers sdpa": transformers_sdpa(query, keys, values), "grouped sdpa": grouped(query, keys, values)}
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention)
        peers["flex_attention"] = lambda: compiled(query, keys, values, scale=scaling, enable_gqa=True)
    yield Case(
        "decode",
        {kernel: lambda: attend(query, keys, values, scaling=scaling, impl=kernel), **peers},
        size(keys, values),
        storage,
        check=gate(attend, query, keys, values, scaling=scaling),
    )
    full = {"as stored above": lambda: attend(query, keys, values, scaling=scaling, impl=kernel)}
    for kind in {torch.bfloat16, torch.float16} - {dtype}:
        k, v = keys.to(kind), values.to(kind)
        yield Case(
            "decode",
            {kernel: lambda k=k, v=v: attend(query, k, v, scaling=scaling, impl=kernel), **full},
            size(k, v),
            str(kind).removeprefix("torch."),
            check=gate(attend, query, k, v, scaling=scaling),
            notes={"error": error(attend(query, k, v, scaling=scaling)[0], query, keys, values, scaling)},
        )
    stored = Int8Rows()
    (k8, ks), (v8, vs) = (stored.parts(stored.pack(slots)) for slots in (keys, values))
    scales = {"keys_scale": ks, "values_scale": vs}
    yield Case(
        "decode",
        {kernel: lambda: attend(query, k8, v8, scaling=scaling, impl=kernel, **scales), **full},
        size(k8, v8, ks, vs),
        "int8",
        check=gate(attend, query, k8, v8, scaling=scaling, **scales),
        notes={"error": error(attend(query, k8, v8, scaling=scaling, **scales)[0], query, keys, values, scaling)},
    )
    yield Case(
        "weights",
        {
            kernel: lambda: attend_with_weights(query, keys, values, reduction="mean", scaling=scaling, impl=kernel),
            "attention and a second pass": lambda: (
                attend(query, keys, values, scaling=scaling, impl=kernel),
                attention_mass(query, keys, scaling=scaling, impl=kernel),
            ),
        },
        size(keys, values),
        check=gate(attend_with_weights, query, keys, values, scaling=scaling, reduction="mean"),
    )

    chosen = torch.randperm(tokens)[:SELECTED].sort().values
    index = chosen[None, None]

    def gathered() -> Tensor:
        k, v = keys[:, :, chosen], values[:, :, chosen]
        return scaled_dot_product_attention(query, k, v, scale=scaling, enable_gqa=True)

    yield Case(
        "selected",
        {
            kernel: lambda: attend(query, keys, values, scaling=scaling, index=index, impl=kernel),
            "transformers sdpa over all": peers["transformers sdpa"],
            "gather + sdpa": gathered,
        },
        size(keys, values) * SELECTED // tokens,
        check=gate(attend, query, keys, values, scaling=scaling, index=index),
    )

    chunk = torch.randn(1, query_heads, CHUNK, dim, dtype=dtype)
    positions, seen = torch.arange(tokens)[None, None], torch.arange(tokens - CHUNK, tokens)[None]
    picked = torch.cat([chosen[chosen < tokens - CHUNK], torch.arange(tokens - CHUNK, tokens)])[None, None]
    mask = torch.arange(tokens) <= seen[0][:, None]
    yield Case(
        "chunk",
        {
            kernel: lambda: attend(
                chunk, keys, values, scaling=scaling, positions=positions, query_positions=seen, index=picked,
                impl=kernel,
            ),
            "transformers sdpa over all": transformers_sdpa(chunk, keys, values, mask[None, None]),
        },
        size(keys, values) * picked.shape[-1] // tokens,
        check=gate(
            attend, chunk, keys, values, scaling=scaling, positions=positions, query_positions=seen, index=picked
        ),
    )  # fmt: skip

    ends = {"sinks": SINKS, "local": LOCAL}
    attention = PreparedAttention(keys, values, {})

    def chosen_anew(k: Tensor, scale: Tensor | None) -> Tensor:
        part = slice(SINKS, tokens - LOCAL)
        votes = head_vote(query, k[:, :, part], keys_scale=None if scale is None else scale[:, :, part])
        best = best_slots(votes, SELECTED - SINKS - LOCAL, impl="reference" if query.is_cpu else "auto") + SINKS
        return listed_slots(best[:, None], slots=tokens, **ends)

    def token_select(threshold: float, k: Tensor, scale: Tensor | None) -> Callable[[], Tensor]:
        """What TokenSelect attends to, found as it finds it while slots are in order."""
        if query.is_cpu:
            step = PreparedVote(query, k, scale, threshold=threshold, top_k=SELECTED - SINKS - LOCAL, **ends)
            return lambda: step.choose(query, tokens)[0]
        return lambda: chosen_anew(k, scale)

    def decode_step(find: Callable[[], Tensor]) -> Call:
        return lambda: attention.attend(query, tokens, scaling=scaling, index=find())

    def checks(find: Callable[[], Tensor], k: Tensor, scale: Tensor | None) -> Callable[[], None]:
        def check() -> None:
            gate(head_vote, query, k, keys_scale=scale)()
            for _ in range(2):
                index = find()
                if index.shape[-1] != SELECTED or not torch.equal(index, chosen_anew(k, scale)):
                    raise AssertionError("other slots than those of most votes")
                gate(attend, query, keys, values, scaling=scaling, index=index)()

        return check

    for stored_as, k, scale in ((storage, keys, None), ("int8", k8, ks)):
        find = token_select(2.0, k, scale)
        yield Case(
            "vote",
            {
                f"{kernel} vote, top-k, attention": decode_step(find),
                "transformers sdpa over all": peers["transformers sdpa"],
            },
            size(k, scale),
            stored_as,
            check=checks(find, k, scale),
        )
    if query.is_cpu:  # on a GPU the decision is waited for, which a captured graph cannot
        find = token_select(0.9, keys, None)
        yield Case(
            "vote used again",
            {
                f"{kernel} cosine, list of slots, attention": decode_step(find),
                "transformers sdpa over all": peers["transformers sdpa"],
            },
            size(keys, values) * SELECTED // tokens,
            storage,
            check=checks(find, keys, None),
        )

    lowest, highest = page_bounds(keys, page_size=PAGE)
    yield Case(
        "page_bounds",
        {name: lambda name=name: page_bounds(keys, page_size=PAGE, impl=name) for name in (kernel, "reference")},
        size(keys),
        check=same(page_bounds, keys, page_size=PAGE),
    )
    yield Case(
        "page_scores",
        {name: lambda name=name: page_scores(query, lowest, highest, impl=name) for name in (kernel, "reference")},
        size(lowest, highest),
        check=gate(page_scores, query, lowest, highest),
    )

    window = torch.randn(1, query_heads, WINDOW, dim, dtype=dtype)
    last = torch.arange(tokens - WINDOW, tokens)[None]
    limits = {"scaling": scaling, "positions": positions, "query_positions": last}
    yield Case(
        "mass of a window",
        {name: lambda name=name: attention_mass(window, keys, impl=name, **limits) for name in (kernel, "reference")},
        size(keys),
        check=gate(attention_mass, window, keys, **limits),
    )
    rows, own = torch.randn(1, query_heads, prompt, dim, dtype=dtype), keys[:, :, :prompt]
    at = torch.arange(prompt)
    whole = {"scaling": scaling, "positions": at[None, None], "query_positions": at[None]}
    sdpa = {"sdpa prefill": lambda: attend(rows, own, own, scaling=scaling, causal=True, impl="fused")}
    prefill = {kernel: lambda: attend(rows, own, own, scaling=scaling, causal=True, impl=kernel), **sdpa}
    part = (rows[:, :, :GATED], own[:, :, :GATED])  # whole prompts are too long for the reference
    first = {"scaling": scaling, "positions": at[None, None, :GATED], "query_positions": at[None, :GATED]}
    checked = gate(attend, *part, part[1], scaling=scaling, causal=True)
    yield Case("prefill", prefill, size(own, own), check=checked, notes={"rows": prompt})
    for name, noise in (("mass of a prompt", {}), ("noisy mass of a prompt", {"noise_seed": 1})):
        ours = {kernel: lambda noise=noise: attention_mass(rows, own, impl=kernel, **whole, **noise)}
        checked = gate(attention_mass, *part, **first, **noise)
        yield Case(name, {**ours, **sdpa}, size(own), check=checked, notes={"rows": prompt})

    kept = torch.rand(1, kv_heads, tokens).topk(SELECTED).indices.sort().values
    yield Case(
        "compact",
        {name: lambda name=name: compact([keys, values], kept, impl=name) for name in (kernel, "reference")},
        size(keys, values) * SELECTED // tokens,
        check=same(compact, [keys, values], kept),
    )
    angles = torch.randn(SELECTED, dim)
    tables = (angles.cos()[None, None], angles.sin()[None, None])
    turned = keys[:, :, :SELECTED]
    yield Case(
        "rotate",
        {name: lambda name=name: rotate(turned, *tables, impl=name) for name in (kernel, "reference")},
        size(turned),
        check=gate(rotate, turned, *tables),
    )
    few, place = keys[:, :, :SELECTED].clone(), positions[:, :, :SELECTED].expand(1, kv_heads, -1).int().contiguous()
    scores, new = torch.rand(1, kv_heads, SELECTED), torch.randn(1, kv_heads, 1, dim, dtype=dtype)

    def evict(name: str) -> Call:
        writer = RowWriter([few, few], (1, kv_heads), impl=name)

        def step() -> None:
            slot = weakest(scores, place, sinks=4, first_recent=SELECTED - 64, impl=name)
            writer.write(slot[..., None], [new, new])

        return step

    limits = {"sinks": 4, "first_recent": SELECTED - 64}
    yield Case(
        "evict one slot",
        {name: evict(name) for name in (kernel, "reference")},
        size(scores, place),
        check=same(weakest, scores, place, **limits),
    )


def error(found: Tensor, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> float:
    """Largest error of an output against fp64 attention over the slots before they were stored, relative to its largest."""
    exact, _ = attend(query.double(), keys.double(), values.double(), scaling=scaling, impl="reference")
    return float((found.double() - exact).abs().max() / exact.abs().max())


def on_gpu() -> bool:
    """Whether tensors are made on a GPU."""
    return torch.get_default_device().type == "cuda"


def timed(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, taking turns; on a GPU the median of many calls each."""
    if on_gpu():
        from triton.testing import do_bench_cudagraph

        return {name: [do_bench_cudagraph(call, return_mode="median") / 1e3] for name, call in calls.items()}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = clock()
            call()
            if turn:
                seconds[name].append(clock() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--prompt", type=int, default=2048, help="rows of the whole-prompt cases")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--operations", nargs="*", help="only those whose name holds one of these words")
    parser.add_argument("--flex", action="store_true", help="compile flex_attention as another peer of decode")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    memory = torch.ones(1 << 10, 1 << 20) if on_gpu() else torch.ones(options.threads, 1 << 26)
    with torch.no_grad():
        for shape in options.shapes:
            dtype = getattr(torch, options.dtype)
            for case in cases(shape, options.tokens, options.prompt, options.flex, dtype):
                if options.operations and not any(word in case.operation for word in options.operations):
                    continue
                line: dict[str, Any] = {"operation": case.operation, "shape": shape, "tokens": options.tokens}
                line |= {"storage": case.storage, **case.notes}
                try:
                    case.check()
                except AssertionError as failure:
                    print(json.dumps(line | {"correct": False, "failure": str(failure)}))
                    continue
                calls = {"read": lambda: memory.sum(dim=1), **case.calls}
                seconds = {name: statistics.median(times) for name, times in timed(calls, options.repeats).items()}
                bandwidth = size(memory) / seconds.pop("read")
                ours = next(iter(seconds.values()))
                machine = {"device": torch.cuda.get_device_name()} if on_gpu() else {"threads": options.threads}
                line |= {**machine, "read_bandwidth_gb_s": round(bandwidth / 1e9, 2)}
                for name, taken in seconds.items():
                    figures = {"implementation": name, "ms": round(taken * 1e3, 4), "ratio": round(taken / ours, 3)}
                    if name.startswith(("native", "triton", "as stored")):
                        figures |= {
                            "gb_s": round(case.bytes / taken / 1e9, 2),
                            "read_share": round(case.bytes / taken / bandwidth, 3),
                        }
                    print(json.dumps(line | {"correct": True} | figures), flush=True)


if __name__ == "__main__":
    main()
