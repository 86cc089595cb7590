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
class CacheReport:
    """A snapshot of a cache. `str()` gives a table, `to_dict()` JSON types. Bytes are of storages really held."""

    policies: list[dict[str, Any]]
    seen_tokens: int
    batch: int
    nbytes: int
    full_nbytes: int
    evictions: int
    selections: int
    selections_reused: int
    layers: tuple[LayerReport, ...]

    @property
    def saved(self) -> float:
        """Share of a full cache's bytes that is not held."""
        return 1 - self.nbytes / self.full_nbytes if self.full_nbytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON types."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "saved": self.saved}

    def __str__(self) -> str:
        names = " + ".join(policy["name"] for policy in self.policies)
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
        Console(file=buffer, width=100).print(table)
        return buffer.getvalue()


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
        seen_tokens=cache.seen_tokens,
        batch=max(cache.policy_layers[0].batch_size, 0),
        nbytes=cache.nbytes,
        full_nbytes=cache.full_nbytes,
        evictions=sum(layer.keeper.evictions for layer in cache.policy_layers),
        selections=sum(selector.misses for selector in selectors),
        selections_reused=sum(selector.hits for selector in selectors),
        layers=tuple(rows),
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
