"""What the interpreted kernels are tested with: outputs poisoned with NaN, an fp64 oracle, and a derived error
budget.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a launcher asks for is full of NaN, so that an output that is never written shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-77)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are used where they lie: copying a storage onto itself would commit all of a reserved mapping."""
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(42)


@pytest.fixture
def within_budget() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Compare with fp64, allowing twice the error of the reference in the same precision, and twice the rounding of
    the output.
    """

    def compare(found: Tensor, exact: Tensor, reference: Tensor) -> None:
        assert found.shape == exact.shape == reference.shape
        assert exact.dtype == torch.float64 and exact.numel() > 0
        finite = torch.isfinite(exact)
        assert torch.equal(finite, torch.isfinite(found)), "infinities at other places, or NaN"
        assert torch.equal(found.double()[~finite], exact[~finite])
        error = (found.double() - exact)[finite].abs()
        reference_error = (reference.double() - exact)[finite].abs()
        if not finite.any():
            return
        rounding = torch.finfo(found.dtype).eps * max(exact[finite].abs().amax().item(), 1e-3)
        budget = 2 * (reference_error.amax().item() + rounding)
        assert error.amax().item() <= budget, f"error {error.amax():.3g} over the budget {budget:.3g}"

    return compare


@pytest.fixture
def oracle() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Attention in fp64 by loops over rows, heads and slots: output, log-sum-exp and weights `[…, rows, entries]`."""
    return attention_by_loops


def attention_by_loops(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    index: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, query_heads, rows, _ = query.shape
    kv_heads = keys.shape[1] if starts is None else starts.shape[1]
    longest = keys.shape[2] if starts is None else int(lengths.max())
    entries = longest if index is None else index.shape[-1]
    masked = positions is not None or starts is not None or index is not None
    output = torch.zeros(batch, query_heads, rows, values.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, query_heads, rows), -torch.inf, dtype=torch.float64)
    weights = torch.zeros(batch, query_heads, rows, entries, dtype=torch.float64)
    for b in range(batch):
        for h in range(query_heads):
            head = h // (query_heads // kv_heads)
            if starts is None:
                key, value, length = keys[b, head].double(), values[b, head].double(), longest
            else:
                first, length = int(starts[b, head]), int(lengths[b, head])
                key, value = keys[first : first + length].double(), values[first : first + length].double()
            if index is None:
                chosen = list(range(length))
            else:
                row = index[min(b, index.shape[0] - 1), min(head, index.shape[1] - 1)].tolist()
                chosen = [slot if slot < length else -1 for slot in row]
            for r in range(rows):
                seen = []
                for entry, slot in enumerate(chosen):
                    if slot < 0:
                        continue
                    place = 0
                    if positions is not None:
                        place = int(positions[min(b, positions.shape[0] - 1), min(head, positions.shape[1] - 1), slot])
                    limit = math.inf
                    if masked and query_positions is not None:
                        limit = int(query_positions[min(b, query_positions.shape[0] - 1), r])
                    if 0 <= place <= limit:
                        seen.append((entry, slot))
                if not seen and sinks is None:
                    continue
                slots = torch.tensor([slot for _, slot in seen], dtype=torch.long)
                scores = key[slots] @ query[b, h, r].double() * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if noise is not None:
                    scores = scores + noise[b, h, r, slots].double()
                scores = scores / temperature
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double() / temperature])
                lse[b, h, r] = torch.logsumexp(scores, 0)
                share = torch.exp(scores - lse[b, h, r])[: len(seen)]
                output[b, h, r] = share @ value[slots] if seen else 0.0
                for (entry, _), weight in zip(seen, share, strict=True):
                    weights[b, h, r, entry] += weight
    return output, lse, weights


@pytest.fixture
def reserved() -> Iterator[Callable[[int], Tensor]]:
    """A flat fp16 tensor of so many elements that no memory stands for until it is written to."""
    maps: list[mmap.mmap] = []

    def reserve(elements: int) -> Tensor:
        if torch.empty(0).is_cuda:
            return torch.empty(elements, dtype=torch.float16, device="cuda")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        maps.append(mmap.mmap(-1, 2 * elements, flags=flags))
        return torch.frombuffer(maps[-1], dtype=torch.float16)

    yield reserve
