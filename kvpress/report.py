"""What a cache has seen, keeps, and weighs."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from kvpress.layer import PolicyLayer

if TYPE_CHECKING:
    from kvpress.cache import PolicyCache


@dataclass(frozen=True)
class LayerReport:
    """One layer: tokens kept are the most of any KV head, `kept_mean` the mean over heads and rows."""

    layer: int
    kind: str
    kept: int
    kept_mean: float
    nbytes: int
    full_nbytes: int


@dataclass(frozen=True)
class TierReport:
    """One tier of an offloaded cache. Copied caches share their tiers, so figures are of all of them together.

    Attributes:
        tier: `"device"`, `"host"` or `"disk"`.
        limit: bytes it may hold, `None` for no limit.
        nbytes, peak_nbytes: bytes it holds now and held at most: blocks, and in the near tier also what layers hold there.
        blocks: blocks it holds.
        hits, misses: requests for a block that it could serve, and that went on to the next tier.
        bytes_in, bytes_out: bytes moved into it and read from it.
        stall_seconds: time that callers waited for its copies, reads and writes; reading ahead in the background is counted too.
        failures: reads and writes that ended in an error.
    """

    tier: str
    limit: int | None
    nbytes: int
    peak_nbytes: int
    blocks: int
    hits: int
    misses: int
    bytes_in: int
    bytes_out: int
    stall_seconds: float
    failures: int


@dataclass(frozen=True)
class CacheReport:
    """A snapshot of a cache. `str()` gives a table, `to_dict()` JSON types. Bytes are of storages really held."""

    policies: list[dict[str, Any]]
    kv_dtype: str | None
    seen_tokens: int
    batch: int
    nbytes: int
    full_nbytes: int
    evictions: int
    selections: int
    selections_reused: int
    layers: tuple[LayerReport, ...]
    tiers: tuple[TierReport, ...] = ()

    @property
    def saved(self) -> float:
        """Share of a full cache's bytes that is not held."""
        return 1 - self.nbytes / self.full_nbytes if self.full_nbytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON types."""
        listed = {name: [asdict(item) for item in getattr(self, name)] for name in ("layers", "tiers")}
        return {**asdict(self), **listed, "saved": self.saved}

    def __str__(self) -> str:
        names = " + ".join(policy["name"] for policy in self.policies)
        names += f" in {self.kv_dtype}" if self.kv_dtype else ""
        table = Table(title=f"{names}: {self.seen_tokens} tokens seen, {self.saved:.1%} of a full cache saved")
        for heading in ("layer", "kind", "tokens kept", "mean per head", "MB held", "MB full"):
            table.add_column(heading, justify="right")
        for group in _runs(self.layers):
            first, last = group[0], group[-1]
            name = str(first.layer) if first is last else f"{first.layer}-{last.layer}"
            held, full = sum(layer.nbytes for layer in group), sum(layer.full_nbytes for layer in group)
            table.add_row(
                name, first.kind, str(first.kept), f"{first.kept_mean:.1f}", f"{held / 1e6:.2f}", f"{full / 1e6:.2f}"
            )
        table.add_section()
        table.add_row("all", "", "", "", f"{self.nbytes / 1e6:.2f}", f"{self.full_nbytes / 1e6:.2f}")
        buffer = io.StringIO()
        console = Console(file=buffer, width=100)
        console.print(table)
        if self.tiers:
            console.print(_tier_table(self.tiers))
        return buffer.getvalue()


def _tier_table(tiers: tuple[TierReport, ...]) -> Table:
    table = Table(title="tiers")
    for heading in ("tier", "limit MB", "MB held", "MB peak", "blocks", "hits", "misses", "MB in", "MB out", "stall s"):
        table.add_column(heading, justify="right")
    for tier in tiers:
        amounts = [tier.limit, tier.nbytes, tier.peak_nbytes, tier.bytes_in, tier.bytes_out]
        limit, held, peak, moved_in, moved_out = ("" if each is None else f"{each / 1e6:.2f}" for each in amounts)
        counts = (str(tier.blocks), str(tier.hits), str(tier.misses))
        table.add_row(tier.tier, limit, held, peak, *counts, moved_in, moved_out, f"{tier.stall_seconds:.2f}")
    return table


def make_report(cache: PolicyCache) -> CacheReport:
    """The report of `cache` as it is now."""
    from kvpress.cache import layer_nbytes

    rows = []
    for index, layer in enumerate(cache.layers):
        held = layer_nbytes(layer)
        if isinstance(layer, PolicyLayer):
            tokens = layer.table.held
            kept, mean = int(tokens.max(initial=0)), float(tokens.mean()) if tokens.size else 0.0
            rows.append(LayerReport(index, layer.policy.name, kept, mean, held, layer.full_nbytes))
        else:
            rows.append(LayerReport(index, type(layer).__name__, 0, 0.0, held, held))
    readers = [layer.reader for layer in cache.policy_layers if layer.reader is not None]
    selectors = [reader.selector for reader in readers if reader.selector is not None]
    return CacheReport(
        policies=[policy.to_dict() for policy in cache.policies.given],
        kv_dtype=cache.kv_dtype,
        seen_tokens=cache.seen_tokens,
        batch=max(cache.policy_layers[0].batch_size, 0),
        nbytes=cache.nbytes,
        full_nbytes=cache.full_nbytes,
        evictions=sum(layer.keeper.evictions for layer in cache.policy_layers),
        selections=sum(selector.misses for selector in selectors),
        selections_reused=sum(selector.hits for selector in selectors),
        layers=tuple(rows),
        tiers=_tiers(cache),
    )


def _tiers(cache: PolicyCache) -> tuple[TierReport, ...]:
    if cache.tiers is None:
        return ()
    return tuple(
        TierReport(
            tier=name,
            limit=found.limit,
            nbytes=found.bytes,
            peak_nbytes=found.peak_bytes,
            blocks=found.blocks,
            hits=found.hits,
            misses=found.misses,
            bytes_in=found.bytes_in,
            bytes_out=found.bytes_out,
            stall_seconds=found.stall_seconds,
            failures=found.failures,
        )
        for name, found in cache.tiers.statistics().items()
    )


def _runs(layers: tuple[LayerReport, ...]) -> list[list[LayerReport]]:
    """Neighbouring layers with the same figures, together."""
    runs: list[list[LayerReport]] = []
    for layer in layers:
        last = runs[-1][-1] if runs else None
        same = last and (last.kind, last.kept, last.kept_mean, last.nbytes) == (
            layer.kind,
            layer.kept,
            layer.kept_mean,
            layer.nbytes,
        )
        if same:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs
