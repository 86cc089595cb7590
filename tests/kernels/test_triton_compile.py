"""Every Triton kernel, compiled for GPUs that are not there: no spill, shared memory within the limit, occupancy
reported.

The launchers run with their kernels replaced by a recorder, so that what is compiled is what they would launch:
argument types,
specialisation and tiles. `KVPRESS_SLOW_TESTS=1` compiles every head size, storage type and configuration, which takes
minutes.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kvpress.kernels import triton_blocks  # noqa: E402
from kvpress.kernels.triton_launch import Remembered  # noqa: E402

SLOW = os.environ.get("KVPRESS_SLOW_TESTS") == "1"
slow = pytest.mark.skipif(not SLOW, reason="minutes of compilation: KVPRESS_SLOW_TESTS=1 runs it")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on: its functions cannot be compiled"
)
OPERATIONS = (
    "attention",
    "attention_mass",
    "head_vote",
    "pages",
    "choosing",
    "compaction",
    "rotation",
    "eviction",
    "packing",
)


@dataclass(frozen=True)
class Device:
    """A GPU target and what one of its multiprocessors has. Sources: CUDA programming guide, CDNA3 instruction set
    guide.
    """

    target: GPUTarget
    program_memory: int  # bytes of shared memory that one program may have
    processor_memory: int
    registers: int  # 32-bit ones a multiprocessor (NVIDIA), a lane of a SIMD (AMD)
    warps: int  # resident at most on a multiprocessor


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 65536, 64),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 65536, 64),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 65536, 64),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 512, 32),
}


@dataclass(frozen=True)
class Usage:
    registers: int
    spilled: int  # bytes of stack (NVIDIA), spilled vector registers and bytes of scratch (AMD)
    shared: int
    warps: int

    def occupancy(self, device: Device) -> float:
        """Share of the resident warps that registers and shared memory allow."""
        rounded = -(-self.registers // 8) * 8
        if device.target.backend == "cuda":
            by_registers = device.registers // (rounded * 32 * self.warps)
            by_memory = device.processor_memory // (self.shared + 1024)
        else:
            by_registers = min(8, device.registers // rounded) * 4 // self.warps
            by_memory = device.processor_memory // max(1, self.shared)
        return min(by_registers, by_memory, device.warps // self.warps) * self.warps / device.warps


@dataclass(frozen=True)
class Launch:
    function: object  # the JITFunction
    arguments: dict[str, object]
    autotuned: bool


class Recorder:
    """Stands for a kernel: keeps what it would be launched with, and launches nothing."""

    def __init__(self, kernel: object, launches: list[Launch]) -> None:
        self.kernel = kernel.kernel if isinstance(kernel, Recorder | Remembered) else kernel
        self.launches = launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.record

    def record(self, *args: object, **kwargs: object) -> None:
        autotuned = hasattr(self.kernel, "configs")
        function = self.kernel.fn if autotuned else self.kernel
        arguments = dict(zip(function.arg_names, args, strict=False)) | kwargs
        self.launches.append(Launch(function, arguments, autotuned))


def recorded(monkeypatch: pytest.MonkeyPatch, device: Device, call: partial) -> list[Launch]:
    """What `call` would launch on `device`."""
    launches: list[Launch] = []
    monkeypatch.setattr(triton_blocks, "interpreted", lambda: False)
    fp32_products = "ieee" if device.target.backend == "hip" else "tf32x3"
    for operation in OPERATIONS:
        kernels = importlib.import_module(f"kvpress.kernels.{operation}.triton_kernels")
        launcher = importlib.import_module(f"kvpress.kernels.{operation}.triton")
        for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
        if hasattr(launcher, "precision"):
            monkeypatch.setattr(launcher, "precision", lambda: fp32_products)
    importlib.import_module("kvpress.kernels.rotation.triton")._launch.cache_clear()  # of another device
    call()
    return launches


def source(launch: Launch, config: dict[str, object]) -> ASTSource:
    """Types and specialisation as the launch would find them: 1 is a constant, multiples of 16 are known as such."""
    function = launch.function
    arguments = launch.arguments | config
    general = {parameter.name for parameter in function.params if parameter.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        name = parameter.name
        value = arguments[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and name not in general):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in general:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constexprs=constants, attrs=attributes)


TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float64: "fp64",
    torch.bool: "i1",
}


def configurations(launch: Launch, device: Device) -> list[triton.Config]:
    """What the autotuner would time on `device`."""
    if not launch.autotuned:
        return [triton.Config({}, num_warps=launch.arguments.get("num_warps", 4))]
    arguments = launch.arguments
    full, amd = arguments["ARITHMETIC"] == tl.float32, device.target.backend == "hip"
    module = importlib.import_module(launch.function.__module__)
    if "BLOCK_V" in arguments:
        return module.choices(**module.situation(arguments, amd, not amd and device.target.arch >= 90))
    return module.choices(arguments["BLOCK_M"], arguments["BLOCK_D"], full, amd)


def compiled(launch: Launch, config: triton.Config, device: Device) -> Usage:
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    binary = triton.compile(source(launch, config.kwargs), target=device.target, options=options)
    shared = binary.metadata.shared
    if device.target.backend == "hip":
        pattern = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)"
        found = dict(re.findall(pattern, binary.asm["amdgcn"]))
        spilled = int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"])
        return Usage(int(found["vgpr_count"]), spilled, shared, config.num_warps)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return Usage(int(registers), int(stack), shared, config.num_warps)


def check(monkeypatch: pytest.MonkeyPatch, name: str, call: partial, kernels: int, all_configs: bool = SLOW) -> None:
    device = DEVICES[name]
    launches = recorded(monkeypatch, device, call)
    assert len(launches) == kernels
    for launch in launches:
        choices = configurations(launch, device)
        for config in choices if all_configs else choices[:1]:
            usage = compiled(launch, config, device)
            label = f"{launch.function.__name__} {name} {config.kwargs} warps={config.num_warps}"
            sys.stdout.write(
                f"{label}: {usage.registers} registers, {usage.spilled} spilled, {usage.shared} B shared, "
                f"occupancy about {usage.occupancy(device):.0%}\n"
            )
            assert usage.spilled == 0, label
            assert usage.shared <= device.program_memory, label
            assert usage.occupancy(device) > 0, label


def attention(
    kind: torch.dtype, dim: int, *, rows: int = 1, storage: torch.dtype | None = None, **options: object
) -> partial:
    """A call of attention with 32 query heads on 8 KV heads, split over the context for a single row."""
    from kvpress.kernels.attention.triton import attend

    query = torch.zeros(2, 32, rows, dim, dtype=kind)
    slots = torch.zeros(2, 8, 64, dim + 4 * (storage == torch.int8), dtype=storage or kind)[
        ..., :dim
    ]  # int8 rows are packed
    arguments = dict.fromkeys(("positions", "query_positions", "starts", "lengths", "index", "softcap", "sinks"))
    if rows > 1:
        arguments |= {"positions": torch.zeros(2, 1, 64).long(), "query_positions": torch.zeros(1, rows).long()}
    if storage == torch.int8:
        arguments |= {"keys_scale": torch.ones(2, 8, 64), "values_scale": torch.ones(2, 8, 64)}
    arguments |= options
    return partial(attend, query, slots, slots, scaling=0.1, splits=2 if rows == 1 else 1, **arguments)


def mass(kind: torch.dtype, dim: int, *, rows: int, noise_seed: int | None = None) -> partial:
    from kvpress.kernels.attention_mass.triton import attention_mass

    query, keys = torch.zeros(2, 32, rows, dim, dtype=kind), torch.zeros(2, 8, 64, dim, dtype=kind)
    masks = {"positions": torch.zeros(2, 1, 64, dtype=torch.int64), "query_positions": torch.zeros(1, rows).long()}
    absent = dict.fromkeys(("starts", "lengths", "softcap", "sinks"))
    return partial(attention_mass, query, keys, scaling=0.1, noise_seed=noise_seed, **masks, **absent)


@pytest.mark.parametrize("name", DEVICES)
def test_attention_decode(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(monkeypatch, name, attention(torch.bfloat16, 128), kernels=2)


@pytest.mark.parametrize("name", DEVICES)
def test_attention_prefill(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(monkeypatch, name, attention(torch.bfloat16, 128, rows=64), kernels=1)


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_attention_fp32(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(monkeypatch, name, attention(torch.float32, 128), kernels=2)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_attention_int8_listed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    index = torch.zeros(2, 8, 64, dtype=torch.int64)
    check(monkeypatch, name, attention(torch.bfloat16, 128, storage=torch.int8, index=index), kernels=2)


@pytest.mark.parametrize("name", ["sm_90"])
def test_attention_ragged_softcap_sinks_weights(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from kvpress.kernels.attention.triton import attend

    rows = torch.zeros(64, 128, dtype=torch.bfloat16)
    places = torch.zeros(2, 8, dtype=torch.int64)
    query = torch.zeros(2, 32, 1, 128, dtype=torch.bfloat16)
    call = partial(
        attend, query, rows, rows, scaling=0.1, positions=None, query_positions=None, starts=places, lengths=places + 4,
        index=None, softcap=30.0, sinks=torch.zeros(32), weights="max", splits=2,
    )  # fmt: skip
    check(monkeypatch, name, call, kernels=3)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_attention_rotation_on_load(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tables = (torch.zeros(64, 128), torch.zeros(64, 128))
    check(monkeypatch, name, attention(torch.bfloat16, 128, rotation=tables, rotate_by="entry"), kernels=2)


@pytest.mark.parametrize("name", DEVICES)
def test_attention_mass(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(monkeypatch, name, mass(torch.bfloat16, 128, rows=64), kernels=2)


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_attention_mass_with_noise(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(monkeypatch, name, mass(torch.bfloat16, 128, rows=64, noise_seed=2**40 + 1), kernels=2)


@pytest.mark.parametrize("name", DEVICES)
def test_small_kernels(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from kvpress.kernels.choosing.triton import best_slots, listed_slots, reused_slots
    from kvpress.kernels.choosing.triton_prepared import VoteLaunches
    from kvpress.kernels.compaction.triton import compact
    from kvpress.kernels.eviction.triton import PreparedWrite, weakest
    from kvpress.kernels.head_vote.triton import head_vote
    from kvpress.kernels.packing.triton import pack_int4, pack_int8
    from kvpress.kernels.pages.triton import page_bounds, page_scores
    from kvpress.kernels.pages.triton_prepared import PageLaunches
    from kvpress.kernels.rotation.triton import rotate
    from kvpress.kernels.triton_best import MOST

    query, keys = torch.zeros(2, 32, 1, 128).bfloat16(), torch.zeros(2, 8, 64, 128).bfloat16()
    tables = torch.zeros(1, 1, 64, 128)

    def call() -> None:
        head_vote(query, keys)
        head_vote(query, torch.zeros(2, 8, 64, 64, dtype=torch.uint8), keys_scale=torch.ones(2, 8, 64))
        page_scores(query, *page_bounds(keys, page_size=16))
        page_bounds(keys.float(), page_size=16)
        compact(keys, torch.zeros(2, 8, 32, dtype=torch.int64))
        rotate(keys, tables, tables)
        slot = weakest(torch.zeros(2, 8, 64), torch.zeros(2, 1, 64, dtype=torch.int32), 4, 60, None)
        row = keys[:, :, :1]
        for place in (slot, 63):
            PreparedWrite([keys, keys, torch.zeros(2, 8, 64)], (2, 8), None).write(place, [row, row, torch.zeros(1, 1)])
        pack_int8(keys)
        pack_int4(keys, torch.zeros(2, 8, 128))
        choice = slot[:, :, None]
        reused_slots(query, query.flatten(1), slot[:, 0] > 0, choice, math.inf, 4, 9, 64)
        listed_slots(choice, 4, 9, 64)
        for many in (64, MOST, MOST + 1):
            best_slots(torch.zeros(2, many), 5)
        chosen = torch.zeros(2, 1, 5, dtype=torch.int64)
        state = (query.flatten(1), chosen[:, 0, 0] > 0, chosen)
        turn = (torch.ones(128), torch.zeros(128))
        for threshold, expected in ((math.inf, False), (-math.inf, True)):
            ends = {"threshold": threshold, "sinks": 4, "local": 9}
            launches = VoteLaunches(query, keys, None, *state, **ends, regroup=False, turn=turn)
            assert launches(query, 64)[1] is expected
        for kind, scale in ((torch.bfloat16, None), (torch.int8, torch.ones(2, 8, 64))):
            bounds = page_bounds(keys, page_size=16)
            PageLaunches(query, *bounds, keys.to(kind), scale, count=2, page_size=16)(query, 64)

    check(monkeypatch, name, call, kernels=32)


@slow
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_attention_everywhere(monkeypatch: pytest.MonkeyPatch, name: str, dim: int, storage: torch.dtype) -> None:
    kind = torch.bfloat16 if storage == torch.int8 else storage
    check(monkeypatch, name, attention(kind, dim, storage=storage), kernels=2)
    check(monkeypatch, name, attention(kind, dim, storage=storage, rows=64), kernels=1)


@slow
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_lists_and_turned_keys_everywhere(
    monkeypatch: pytest.MonkeyPatch, name: str, dim: int, storage: torch.dtype
) -> None:
    kind = torch.bfloat16 if storage == torch.int8 else storage
    turned = {"rotation": (torch.zeros(64, dim), torch.zeros(64, dim)), "rotate_by": "entry"}
    listed = {"index": torch.zeros(2, 8, 64, dtype=torch.int64)}
    check(monkeypatch, name, attention(kind, dim, storage=storage, rows=64, **listed), kernels=1)
    for options in (turned, turned | listed):  # a single row alone turns keys as it reads them
        check(monkeypatch, name, attention(kind, dim, storage=storage, **options), kernels=2)


@slow
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_attention_mass_everywhere(monkeypatch: pytest.MonkeyPatch, name: str, dim: int, kind: torch.dtype) -> None:
    check(monkeypatch, name, mass(kind, dim, rows=64), kernels=2)
    check(monkeypatch, name, mass(kind, dim, rows=1), kernels=1)
    check(monkeypatch, name, mass(kind, dim, rows=64, noise_seed=3), kernels=2)


def test_a_spill_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading of the compiled object is not blind: fp32 products in plain FMA over wide tiles do spill."""
    device = DEVICES["sm_80"]
    (launch, _) = recorded(monkeypatch, device, attention(torch.float32, 128))
    launch.arguments["PRECISION"] = "ieee"
    assert compiled(launch, triton.Config({"BLOCK_N": 64}, num_warps=4, num_stages=2), device).spilled > 0
