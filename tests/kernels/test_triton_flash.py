"""The flash-attn path with a fake package: it checks the arguments as the real one does, and computes what the real
one promises.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kvpress.kernels.attention import flash, reference

ABSENT = dict.fromkeys(("positions", "query_positions", "starts", "lengths", "index", "softcap", "sinks"))


def sequence(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, softcap: float
) -> tuple[Tensor, Tensor]:
    """One sequence `[rows, heads, dim]`, causal from the bottom right corner; `+inf` marks a row that saw nothing."""
    group = query.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys.float().repeat_interleave(group, 1)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        rows, slots = scores.shape[1:]
        scores = scores.masked_fill(torch.ones(rows, slots).triu(slots - rows + 1).bool(), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None].masked_fill(lse[..., None] == -torch.inf, 0))
    output = torch.einsum("hqk,khd->qhd", weights, values.float().repeat_interleave(group, 1))
    return output.to(query.dtype), lse.masked_fill(lse == -torch.inf, torch.inf)


def check_common(query, keys, values, dropout_p, softmax_scale, softcap, return_attn_probs):
    assert query.dtype == keys.dtype == values.dtype and query.dtype in (torch.float16, torch.bfloat16)
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    assert query.shape[-1] == keys.shape[-1] == values.shape[-1] and query.shape[-1] % 8 == 0
    assert dropout_p == 0.0 and isinstance(softmax_scale, float) and isinstance(softcap, float)
    assert return_attn_probs is True


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Installs the fake package; the list tells which of its functions ran."""
    made: list[str] = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, softcap=0.0, return_attn_probs=False):
        made.append("dense")
        assert q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] and k.shape == v.shape
        check_common(q, k, v, dropout_p, softmax_scale, softcap, return_attn_probs)
        rows = [sequence(*parts, softmax_scale, causal, softcap) for parts in zip(q, k, v, strict=True)]
        return torch.stack([output for output, _ in rows]), torch.stack([lse for _, lse in rows]), None

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, softcap=0.0, return_attn_probs=False,
    ):  # fmt: skip
        made.append("ragged")
        assert q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape
        check_common(q, k, v, dropout_p, softmax_scale, softcap, return_attn_probs)
        for ends, total, longest in ((cu_seqlens_q, len(q), max_seqlen_q), (cu_seqlens_k, len(k), max_seqlen_k)):
            assert ends.dtype == torch.int32 and ends.dim() == 1 and ends[0] == 0 and ends[-1] <= total
            assert isinstance(longest, int) and ends.diff().min() >= 0 and ends.diff().max() == longest
        assert cu_seqlens_q[-1] == len(q) and len(cu_seqlens_q) == len(cu_seqlens_k)
        output, lse = torch.full(q.shape, torch.nan, dtype=q.dtype), torch.full((q.shape[1], len(q)), torch.nan)
        for i in range(len(cu_seqlens_q) - 1):
            rows, slots = (slice(*ends[i : i + 2].tolist()) for ends in (cu_seqlens_q, cu_seqlens_k))
            output[rows], lse[:, rows] = sequence(q[rows], k[slots], v[slots], softmax_scale, causal, softcap)
        return output, lse, None

    package = ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flash, "installed", lambda: True)
    return made


def compare(query: Tensor, keys: Tensor, values: Tensor, **options: object) -> None:
    options = ABSENT | {"scaling": 0.3} | options
    names = ("scaling", "positions", "query_positions", "starts", "lengths", "softcap")
    taken = {name: options[name] for name in names}
    output, lse = flash.attend(query, keys, values, **taken)
    expected, expected_lse, _ = reference.attend(query, keys, values, **options)
    assert not output.isnan().any() and (output != 0).any()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)


def make(rows: int, slots: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(42)
    query = torch.randn(2, 6, rows, 16, generator=generator)
    keys, values = torch.randn(2, 2, 2, slots, 16, generator=generator).unbind()
    return query.bfloat16(), keys.bfloat16(), values.bfloat16()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_prefill(calls: list[str], softcap: float | None) -> None:
    query, keys, values = make(rows=9)
    masks = {"positions": torch.arange(33).view(1, 1, -1), "query_positions": torch.arange(24, 33)[None]}
    assert flash.unfit(query, keys, values, None, None, None) is None
    assert flash.hidden(query, keys, **masks, starts=None, lengths=None) is None
    compare(query, keys, values, **masks, softcap=softcap)
    compare(query, keys, values, softcap=softcap)  # nothing masked: every row sees all
    assert calls == ["dense", "dense"]


def ragged() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    query, _, _ = make(rows=1)
    lengths = torch.tensor([[3, 0], [20, 7]])
    starts = lengths.flatten().cumsum(0).view(2, 2) - lengths
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 40, 16, generator=generator).bfloat16()  # more rows than the heads have
    return query, *rows.unbind(), {"starts": starts, "lengths": lengths}


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_ragged_decoding(calls: list[str], softcap: float | None) -> None:
    query, keys, values, layout = ragged()
    assert flash.unfit(query, keys, values, layout["starts"], None, None) is None
    assert flash.hidden(query, keys, None, None, **layout) is None
    compare(query, keys, values, **layout, softcap=softcap)
    absent = {"positions": None, "query_positions": None}
    output, lse = flash.attend(query, keys, values, scaling=0.3, **absent, **layout, softcap=softcap)
    assert (output[0, 3:] == 0).all() and (lse[0, 3:] == -torch.inf).all()  # the head without a slot
    assert calls == ["ragged", "ragged"]


def test_what_it_cannot_show() -> None:
    """Each way in which the positions call for a mask is refused, and each that does not is let through."""
    query, keys, _ = make(rows=9)
    flat = {"starts": None, "lengths": None}
    in_order, last = torch.arange(33).view(1, 1, -1), torch.arange(24, 33)[None]
    holes = in_order.clone()
    holes[..., 4] = -1
    assert flash.hidden(query, keys, in_order, last, **flat) is None
    assert "causal by slot" in flash.hidden(query, keys, holes, last, **flat)
    assert "causal by slot" in flash.hidden(query, keys, in_order.flip(-1), last, **flat)
    assert "causal by slot" in flash.hidden(query, keys, in_order, last - 1, **flat)
    assert "empty slots" in flash.hidden(query, keys, in_order, None, **flat)

    query, keys, _, layout = ragged()
    gaps = layout | {"starts": layout["starts"] + 1}
    assert "without gaps" in flash.hidden(query, keys, None, None, **gaps)
    positions = torch.arange(20).expand(2, 2, 20)
    assert flash.hidden(query, keys, positions, torch.tensor([[19]]), **layout) is None
    assert "some are hidden" in flash.hidden(query, keys, positions, torch.tensor([[18]]), **layout)
    assert flash.hidden(query, keys, positions, torch.tensor([[18], [19]]), **layout) is None
    assert "row sees none" in flash.hidden(query, keys, None, torch.tensor([[-1]]), **layout)


def test_refusals(calls: list[str]) -> None:
    query, keys, values = make(rows=9)
    options = dict.fromkeys(("positions", "query_positions", "starts", "lengths", "index", "sinks"))
    assert "runs on CUDA devices, query is on cpu" in flash.refusal(query, keys, values, **options)
    assert "fp16 or bf16" in flash.unfit(query.float(), keys, values, None, None, None)
    assert "one head size" in flash.unfit(query, keys, values[..., :8], None, None, None)
    assert "no index list" in flash.unfit(query, keys, values, None, torch.zeros(1, 1, 1), None)
    assert "no sinks" in flash.unfit(query, keys, values, None, None, torch.zeros(6))
    assert "not a single row" in flash.unfit(query[:, :, :1], keys, values, None, None, None)
    assert "one row over ragged" in flash.unfit(query, keys, values, torch.zeros(2, 2), None, None)
    assert calls == []
