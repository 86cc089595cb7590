"""Attention over slots in fp64, one slot at a time: what the kernels are measured against, and how far they may be
off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def listed_slots(
    batch: int, head: int, slots: int, positions: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, positions and places in the list of the entries of one head that hold a token; without positions all are
    0."""
    slot = torch.arange(slots) if index is None else index[batch % len(index), head % index.shape[1]].long()
    place = torch.arange(len(slot))
    keep = (slot >= 0) & (slot < slots)
    slot, place = slot[keep], place[keep]
    if positions is None:
        return slot, torch.zeros_like(slot), place
    position = positions[batch % len(positions), head % positions.shape[1]].long()[slot]
    return slot[position >= 0], position[position >= 0], place[position >= 0]


def oracle(
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
    keys_scale: Tensor | None = None,
    values_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and weights `[batch, query_heads, rows, entries]` of `attend`, all in fp64, head by head."""
    keys, values = keys.double(), values.double()
    if keys_scale is not None:
        keys = keys * keys_scale.double()[..., None]
    if values_scale is not None:
        values = values * values_scale.double()[..., None]
    batch, query_heads, rows, _ = query.shape
    kv_heads = keys.shape[1] if starts is None else starts.shape[1]
    if index is not None:
        entries = index.shape[-1]
    else:
        entries = keys.shape[2] if lengths is None else int(lengths.max())
    output = torch.zeros(batch, query_heads, rows, values.shape[-1], dtype=torch.float64)
    sums = torch.full((batch, query_heads, rows), -math.inf, dtype=torch.float64)
    weights = torch.zeros(batch, query_heads, rows, entries, dtype=torch.float64)
    for b in range(batch):
        for head in range(query_heads):
            h = head // (query_heads // kv_heads)
            if starts is None or lengths is None:
                own_keys, own_values, count = keys[b, h], values[b, h], keys.shape[2]
            else:
                first, count = int(starts[b, h]), int(lengths[b, h])
                own_keys, own_values = keys[first : first + count], values[first : first + count]
            slot, position, place = listed_slots(b, h, count, positions, index)
            plain = positions is None and starts is None and index is None
            for row in range(rows):
                seen = math.inf if plain or query_positions is None else query_positions[b % len(query_positions), row]
                visible = position <= seen
                chosen = slot[visible]
                scores = (own_keys[chosen] @ query[b, head, row].double()) * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                everything = scores if sinks is None else torch.cat([scores, sinks[head].double()[None]])
                if everything.numel() == 0:
                    continue
                lse = torch.logsumexp(everything, dim=0)
                share = torch.exp(scores - lse)
                output[b, head, row] = share @ own_values[chosen]
                sums[b, head, row] = lse
                weights[b, head, row, place[visible]] = share
    return output, sums, weights


def error_budget(low_precision: Tensor, exact: Tensor, of: torch.dtype) -> float:
    """Twice (the error of a readable low-precision run, and the rounding of results to `of`): never a number of our
    own."""
    finite = torch.isfinite(exact)
    off = (low_precision.double() - exact)[finite]
    band = torch.finfo(of).eps * (1 + exact[finite].abs().amax().item() if finite.any() else 1.0)
    return 2 * ((off.abs().max().item() if off.numel() else 0.0) + band)


def assert_within_budget(found: Tensor, low_precision: Tensor, exact: Tensor) -> None:
    """`found` equals the fp64 `exact` within `error_budget`; infinities lie at the same places.

    Raises:
        AssertionError: it does not.
    """
    if found.shape != exact.shape:
        raise AssertionError(f"shape {tuple(found.shape)}, expected {tuple(exact.shape)}")
    finite = torch.isfinite(exact)
    if not torch.equal(torch.isfinite(found), finite) or not torch.equal(found.double()[~finite], exact[~finite]):
        raise AssertionError("infinities or NaN differ")
    budget = error_budget(low_precision, exact, found.dtype)
    if budget > 0.05 * (1 + (exact[finite].abs().max().item() if finite.any() else 0.0)):
        raise AssertionError(f"the low-precision run is itself wrong: it gives a budget of {budget:.3g}")
    off = (found.double() - exact)[finite].abs()
    worst = off.max().item() if off.numel() else 0.0
    if worst > budget:
        raise AssertionError(f"off by {worst:.3g}, budget {budget:.3g}")


def rejected(check: Callable[..., None], *arguments: Any) -> bool:
    """Whether `check` fails on a sabotaged result, as it must."""
    try:
        check(*arguments)
    except AssertionError:
        return True
    return False
