"""Which tile suits a GPU: every configuration of the attention and vote kernels timed, beside torch's own attention. One JSON line each.

    python benchmarks/triton_tiles.py --cases decode selected int8
    python benchmarks/triton_tiles.py --tiles 128,4,3 64,4,2 --programs 2 4

Llama-3-8B's shape (32 query heads, 8 KV heads, 128 dims), bf16 but for `fp32` and `int8`. Times are the device's: calls are captured
in a graph and replayed, so that what a launch costs the host is not in them (`triton.testing.do_bench_cudagraph`, median). `selected`
reads eight lists of 2,048 slots, one after the other, so that they do not stay in the GPU's caches; its time is that of one. What serves
by default is written in `choices` of `kernels/attention/triton_kernels.py` and `kernels/attention_mass/triton_kernels.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench_cudagraph

from kvpress.kernels import triton_support
from kvpress.kernels.attention.triton import attend
from kvpress.kernels.attention.triton_kernels import attend_kernel
from kvpress.kernels.attention_mass.triton_kernels import lse_kernel
from kvpress.kernels.head_vote.triton import head_vote
from kvpress.kernels.triton_launch import Remembered
from kvpress.row_format import Int8Rows

ABSENT: dict[str, Any] = dict.fromkeys(
    ("positions", "query_positions", "starts", "lengths", "index", "softcap", "sinks")
)
SELECTED, LISTS, CHUNK = 2048, 8, 512
TILES = list(itertools.product((16, 32, 64, 128), (2, 4, 8), (2, 3, 4)))


@dataclass
class Case:
    """What is timed: a call, the bytes it must read, how many steps it makes, and the kernel whose tile is varied."""

    call: Callable[[], Any]
    bytes: int
    kernel: Remembered = attend_kernel
    steps: int = 1


def slots(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, 1, 8, tokens, 128, dtype=dtype)


def rows(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, 32, count, 128, dtype=dtype)


def make(name: str, tokens: int) -> Case:
    """The case of one name."""
    query = rows(1, torch.float32 if name == "fp32" else torch.bfloat16)
    keys, values = slots(tokens, query.dtype)
    options = ABSENT | {"scaling": 128**-0.5}
    if name in ("int8", "int8 vote"):
        (keys, keys_scale), (values, values_scale) = (
            Int8Rows().parts(Int8Rows().pack(each)) for each in (keys, values)
        )
        size = keys.numel() + 4 * keys.shape[1] * tokens
        if name == "int8 vote":
            return Case(lambda: head_vote(query, keys, keys_scale=keys_scale), size, lse_kernel)
        scales = {"keys_scale": keys_scale, "values_scale": values_scale}
        return Case(lambda: attend(query, keys, values, **options, **scales), 2 * size)
    if name == "vote":
        return Case(lambda: head_vote(query, keys), keys.nbytes, lse_kernel)
    if name == "selected":
        lists = [torch.randperm(tokens)[:SELECTED].sort().values[None, None] for _ in range(LISTS)]
        read = LISTS * SELECTED * 8 * 128 * 2 * keys.element_size()
        return Case(
            lambda: [attend(query, keys, values, **options | {"index": each}) for each in lists], read, steps=LISTS
        )
    if name == "chunk":
        own = torch.arange(tokens - CHUNK, tokens)
        listed = torch.cat([torch.randperm(tokens - CHUNK)[:SELECTED].sort().values, own])[None, None]
        masks = {"index": listed, "positions": torch.arange(tokens)[None, None], "query_positions": own[None]}
        chunk = rows(CHUNK)
        return Case(
            lambda: attend(chunk, keys, values, **options | masks),
            listed.shape[-1] * 8 * 128 * 2 * keys.element_size(),
        )
    return Case(lambda: attend(query, keys, values, **options), 2 * keys.nbytes)


CASES = ("decode", "selected", "chunk", "int8", "fp32", "vote", "int8 vote")


def use(kernel: Remembered, tile: tuple[int, int, int]) -> None:
    """Let the autotuner have one configuration: slots a tile, warps, stages."""
    tuner = kernel.kernel
    tuner.configs[:] = [triton.Config({"BLOCK_N": tile[0]}, num_warps=tile[1], num_stages=tile[2])]
    tuner.cache.clear()
    kernel._compiled.clear()


def emit(case: Case, milliseconds: float, /, **facts: Any) -> None:
    figures = {
        "microseconds": round(1e3 * milliseconds / case.steps, 1),
        "gb_s": round(case.bytes / milliseconds / 1e6),
    }
    print(json.dumps(facts | figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--tiles", nargs="*", help="BLOCK_N,warps,stages of each; left out: 36 of them")
    parser.add_argument("--programs", type=int, nargs="*", default=[2, 4], help="programs a multiprocessor")
    options = parser.parse_args()
    tiles = [tuple(map(int, tile.split(","))) for tile in options.tiles] if options.tiles else TILES
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    print(json.dumps({"device": torch.cuda.get_device_name(), "tokens": options.tokens, "triton": triton.__version__}))
    query, (keys, values) = rows(1), slots(options.tokens)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel([backend]):
            whole = Case(lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True), 2 * keys.nbytes)
            emit(
                whole, do_bench_cudagraph(whole.call, return_mode="median"), case="decode", peer=f"sdpa, {backend.name}"
            )
    for name in options.cases:
        case = make(name, options.tokens)
        for tile, programs in itertools.product(tiles, options.programs):
            use(case.kernel, tile)  # type: ignore[arg-type]
            triton_support.PROGRAMS_A_PROCESSOR = programs
            try:
                case.call()
                emit(case, do_bench_cudagraph(case.call, return_mode="median"), case=name, tile=tile, programs=programs)
            except triton.OutOfResources as error:
                print(json.dumps({"case": name, "tile": tile, "refused": str(error)}), flush=True)


if __name__ == "__main__":
    main()
