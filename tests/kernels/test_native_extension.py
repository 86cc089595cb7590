"""How the extension lives in a process: one OpenMP runtime, torch's thread count, no GIL, and life without it."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time

import pytest
import torch

from kvpress.kernels import dispatch
from kvpress.kernels.attention import attend
from kvpress.kernels.native import extension, missing
from kvpress.kernels.native import tensors as native
from kvpress.testing.slots_oracle import assert_within_budget, oracle

built = pytest.mark.skipif(extension is None, reason="the native kernels are not built")


@built
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime() -> None:
    """torch's runtime serves the extension: no second pool of threads, whatever is imported first."""
    code = (
        "import kvpress.kernels.attention, torch; from pathlib import Path\n"
        "q = torch.randn(1, 6, 1, 64); k = torch.randn(1, 2, 9000, 64)\n"
        "torch.set_num_threads(2); torch.mm(torch.randn(900, 900), torch.randn(900, 900))\n"
        "kvpress.kernels.attention.attend(q, k, k, scaling=1.0, impl='native')\n"
        "maps = Path('/proc/self/maps').read_text()\n"
        "print(len({l.split()[-1] for l in maps.splitlines() if 'gomp' in l or 'iomp' in l or 'libomp' in l}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1", run.stdout


@built
def test_other_python_threads_run_meanwhile() -> None:
    query, keys = torch.randn(1, 64, 400, 128), torch.randn(1, 8, 4000, 128)
    spans = []

    def work() -> None:
        begin = time.perf_counter()
        attend(query, keys, keys, scaling=0.1, impl="native")
        spans.append((begin, time.perf_counter()))

    thread = threading.Thread(target=work)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0)
    thread.join()
    begin, end = spans[0]
    inside = [tick for tick in ticks if begin < tick < end]
    assert len(inside) > 3 and inside[-1] - inside[0] > 0.2 * (end - begin)


@built
def test_unknown_levels_and_wrong_fields_are_refused() -> None:
    assert extension is not None
    assert extension.level() in extension.levels() and "baseline" in extension.levels()
    with pytest.raises(ValueError, match="levels"):
        extension.use_level("sse9")
    with pytest.raises(TypeError, match="arguments"):
        extension.attention(1, 2, 3)
    with pytest.raises(TypeError):
        extension.weakest(*["x"] * 16)


@built
def test_memory_outside_is_never_read() -> None:
    query, keys = torch.randn(1, 2, 1, 64), torch.randn(1, 1, 10, 64)
    for impl in ("native", "reference"):
        with pytest.raises(IndexError):
            attend(query, keys, keys, scaling=1.0, index=torch.tensor([[[10]]]), impl=impl)
    flat = keys[0, 0]
    for starts, lengths in ((5, 6), (-1, 3), (0, -2)):
        with pytest.raises(ValueError, match="starts and lengths"):
            attend(
                query, flat, flat, scaling=1.0, starts=torch.tensor([[starts]]), lengths=torch.tensor([[lengths]]),
                impl="native",
            )  # fmt: skip
    for wrong in (
        {"positions": torch.zeros(1, 1, 9, dtype=torch.int64)},
        {"query_positions": torch.zeros(1, 2, dtype=torch.int64)},
        {"index": torch.zeros(1, 3, 4, dtype=torch.int64)},
        {"sinks": torch.zeros(3)},
        {"keys_scale": torch.ones(1, 1, 10)},
    ):
        with pytest.raises(ValueError):
            attend(query, keys, keys, scaling=1.0, impl="native", **wrong)


def test_refusals_name_the_reason() -> None:
    query, keys = torch.randn(1, 2, 1, 64), torch.randn(1, 1, 10, 64)
    if missing is None:
        assert native.refusal(query, keys, keys) is None
        assert "float64" in str(native.refusal(query.double(), keys, keys))
        assert "one type" in str(native.refusal(query, keys, keys.half()))
        assert "contiguous" in str(native.refusal(query, keys.transpose(2, 3), keys))
        assert "gradient" in str(native.refusal(query.requires_grad_(), keys, keys))
        with pytest.raises(ValueError, match="float64"):
            attend(query.detach().double(), keys.double(), keys.double(), scaling=1.0, impl="native")
        exact, lse = attend(query.detach().double(), keys.double(), keys.double(), scaling=1.0, softcap=9.0)
        assert exact.dtype == torch.float64 and lse is not None and lse.dtype == torch.float64


def test_whole_prompts_go_where_they_are_fast(level: str) -> None:
    """To the native kernels where they have wide vectors, else to torch's matrix products, which return no log-sum-exp."""
    query, keys = torch.randn(1, 4, 70, 64), torch.randn(1, 2, 70, 64)
    slot = torch.arange(70)
    exact, exact_lse, _ = oracle(
        query, keys, keys, scaling=0.125, positions=slot[None, None], query_positions=slot[None]
    )
    output, lse = attend(query, keys, keys, scaling=0.125, causal=True)
    low, low_lse = attend(query, keys, keys, scaling=0.125, causal=True, impl="reference")
    assert_within_budget(output, low, exact)
    assert (lse is None) == (level == "baseline")
    if lse is not None and low_lse is not None:
        assert_within_budget(lse, low_lse, exact_lse)


def test_auto_says_once_what_it_picked(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_announced", set())
    query, keys = torch.randn(1, 2, 1, 64), torch.randn(1, 1, 10, 64)
    with caplog.at_level(logging.INFO, logger="kvpress.kernels"):
        for _ in range(3):
            attend(query, keys, keys, scaling=1.0)
    assert [record.message for record in caplog.records] == [
        f"attention runs on the {'native' if missing is None else 'fused'} implementation"
    ]


def test_without_the_extension() -> None:
    """Where it was not compiled everything runs on torch, and one warning says so."""
    code = (
        "import sys; sys.modules['kvpress.kernels.native._native'] = None  # importing it raises ImportError\n"
        "import torch, kvpress.kernels.attention as a, kvpress.kernels.eviction as e\n"
        "q = torch.randn(1, 2, 1, 64); k = torch.randn(1, 1, 10, 64)\n"
        "a.attend(q, k, k, scaling=1.0); a.attend(q, k, k, scaling=1.0, softcap=2.0)\n"
        "e.weakest(torch.zeros(1, 1, 3), torch.arange(3)[None, None])\n"
        "try:\n    a.attend(q, k, k, scaling=1.0, impl='native')\n"
        "except ValueError as error:\n    print('not built' in str(error))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"
    assert run.stderr.count("native kernels are not built") == 1
