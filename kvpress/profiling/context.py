"""`kvpress.profile`: memory and time of what a script does with a model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from kvpress.profiling.cache_bytes import CacheBytes, cache_bytes
from kvpress.profiling.cuda_snapshot import memory_history
from kvpress.profiling.phases import Phase, PhaseRecorder
from kvpress.profiling.quantities import written_bytes


@dataclass
class Profile:
    """What `profile` measured; filled when its block ends.

    Attributes:
        batch: rows of the last forward.
        prefill, decode: time and memory of the forwards of several tokens, and of one.
        first_token_seconds: from the start of the block until the first new token was fed, or its forward ended.
        weights_bytes: parameters and buffers of the model.
        prefilled: the cache after the last prompt.
        cache: the cache at the end; `None` where no forward used one.
        resident_method: how peaks of resident memory were found: `"exact"` or `"sampled"`.
    """

    batch: int = 0
    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)
    first_token_seconds: float | None = None
    weights_bytes: int = 0
    prefilled: CacheBytes | None = None
    cache: CacheBytes | None = None
    resident_method: str = ""

    @property
    def token_milliseconds(self) -> float | None:
        """Mean time of a decoding step, of all batch rows at once."""
        return 1000 * self.decode.seconds / self.decode.forwards if self.decode.forwards else None

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON types."""
        return {
            "batch": self.batch,
            "first_token_seconds": self.first_token_seconds,
            "token_milliseconds": self.token_milliseconds,
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "resident_method": self.resident_method,
            "weights_bytes": self.weights_bytes,
            "prefilled_bytes": None if self.prefilled is None else self.prefilled.held_bytes,
            "cache": None if self.cache is None else self.cache.to_dict(),
        }

    def __str__(self) -> str:
        table = Table(title="Profile")
        for name in ("phase", "tokens", "seconds", "tokens/s", "resident peak", "above its start", "CUDA peak"):
            table.add_column(name, justify="left" if name == "phase" else "right")
        for name, phase in (("prefill", self.prefill), ("decode", self.decode)):
            table.add_row(name, *_cells(phase))
        buffer = io.StringIO()
        console = Console(file=buffer, width=110)
        console.print(table)
        for line in self._sentences():
            console.print(line, highlight=False)
        return buffer.getvalue()

    def _sentences(self) -> Iterator[str]:
        if self.first_token_seconds is not None:
            pace = self.token_milliseconds
            yield f"first token after {self.first_token_seconds:.3g} s" + (
                "" if pace is None else f", {pace:.3g} ms each"
            )
        if self.cache is not None:
            held, kept, full = map(
                written_bytes, (self.cache.held_bytes, self.cache.logical_bytes, self.cache.full_bytes)
            )
            yield f"cache: {held} held, {kept} of it keys and values that were kept; a full cache: {full}"
            if self.cache.tiers:
                yield "tiers: " + ", ".join(f"{written_bytes(size)} {name}" for name, size in self.cache.tiers.items())


def _cells(phase: Phase) -> list[str]:
    pace, peak, before = phase.tokens_per_second, phase.resident_peak_bytes, phase.resident_before_bytes
    return [
        f"{phase.tokens:,}",
        f"{phase.seconds:.3f}",
        "-" if pace is None else f"{pace:.1f}",
        "-" if peak is None else written_bytes(peak),
        "-" if peak is None or before is None else written_bytes(peak - before),
        "-" if phase.cuda_peak_bytes is None else written_bytes(phase.cuda_peak_bytes),
    ]


@contextmanager
def profile(
    model: nn.Module, *, exact_peaks: bool = False, cuda_snapshot: str | Path | None = None
) -> Iterator[Profile]:
    """Measure the forwards of `model` inside the block: time, peaks of memory, and what their cache holds.

    The model gets two hooks, which are gone after the block, however it ends. Blocks may nest. A forward of more than one token is
    prefill, one of a single token decode; of a CUDA model every forward is waited for.

    Args:
        model: a decoder model of transformers.
        exact_peaks: clear the high-water marks of this process's resident memory (Linux) and of the CUDA device, which makes peaks
            exact. They belong to the whole process and cannot be put back. Otherwise resident memory is sampled every 2 ms, and a CUDA
            peak is told only where the block raised the mark.
        cuda_snapshot: write the device's allocations to this file, for https://pytorch.org/memory_viz.

    Yields:
        A `Profile`, filled when the block ends.

    Raises:
        ValueError: a snapshot was asked for, and the model is not on a CUDA device; or the file is there already.
        TypeError: a forward without ids or embeddings.

    Example:
        with kvpress.profile(model) as profile:
            model.generate(**inputs, cache=PolicyCache(model, "snapkv", budget=1024), max_new_tokens=64)
        print(profile)
    """
    result = Profile()
    recorder = PhaseRecorder(model, exact=exact_peaks)
    with memory_history(recorder.device, cuda_snapshot):
        recorder.open()
        try:
            yield result
        finally:
            recorder.close()
            result.batch = recorder.batch
            result.prefill, result.decode = recorder.phases["prefill"], recorder.phases["decode"]
            result.first_token_seconds = recorder.first_token_seconds
            result.weights_bytes = weights_bytes(model)
            result.prefilled = recorder.prefilled
            result.cache = None if recorder.cache is None else cache_bytes(recorder.cache)
            result.resident_method = recorder.resident_method


def weights_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
