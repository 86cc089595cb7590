"""Prefill and decode apart: what every forward of a model took, seen from hooks that are gone afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvpress.cache_argument import found
from kvpress.profiling.cache_bytes import CacheBytes, cache_bytes
from kvpress.profiling.peak import Meter, cuda_meter, resident_meter


@dataclass
class Phase:
    """The forwards of one kind: `prefill`, more than one token, or `decode`, one.

    Attributes:
        forwards: how many.
        tokens: fed, of all batch rows.
        seconds: prefill: inside the forwards. Decode: from the end of the forward before, so that choosing the token counts.
        resident_before_bytes, resident_peak_bytes: of the process. Peaks are `None` where they are not known.
        cuda_before_bytes, cuda_peak_bytes: allocated on the model's device; `None` without CUDA.
    """

    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resident_before_bytes: int | None = None
    resident_peak_bytes: int | None = None
    cuda_before_bytes: int | None = None
    cuda_peak_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Throughput of all batch rows; `None` where nothing ran."""
        return self.tokens / self.seconds if self.seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


class PhaseRecorder:
    """Hooks of one model between `open` and `close`.

    Args:
        model: whose forwards are watched.
        exact: clear the marks of memory, for exact peaks.
        clock: seconds.
    """

    def __init__(self, model: nn.Module, *, exact: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self.model = model
        self.exact = exact
        self.clock = clock
        self.device = next(model.parameters()).device
        self.phases = {"prefill": Phase(), "decode": Phase()}
        self.batch = 0
        self.opened = 0.0
        self.first_token_seconds: float | None = None
        self.prefilled: CacheBytes | None = None  # at the end of the last prefill
        self.cache: Any = None
        self.resident_method = ""
        self._kind: str | None = None
        self._began = 0.0
        self._last_end: float | None = None
        self._meters: tuple[Meter, Meter | None] | None = None
        self._handles: list[Any] = []

    def open(self) -> None:
        """Set the hooks, start the clock."""
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]
        self.opened = self.now()

    def close(self) -> None:
        """Take the hooks away, end the last phase."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._switch(None)
        prefill = self.phases["prefill"]
        if self.first_token_seconds is None and prefill.forwards and self._last_end is not None:
            self.first_token_seconds = self._last_end - self.opened

    def now(self) -> float:
        """The clock, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, rows = _fed(args, kwargs)
        kind = "prefill" if rows > 1 else "decode"
        if kind == "decode" and self.first_token_seconds is None and self.phases["prefill"].forwards:
            self.first_token_seconds = self.now() - self.opened
        if kind != self._kind:
            self._switch_untimed(kind)
        self.batch = batch
        self._began = self.now() if kind == "prefill" or self._last_end is None else self._last_end

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch, rows = _fed(args, kwargs)
        self._last_end = self.now()
        phase = self.phases["prefill" if rows > 1 else "decode"]
        phase.forwards += 1
        phase.tokens += batch * rows
        phase.seconds += self._last_end - self._began
        returned = found(output) if isinstance(output, Mapping) else None
        self.cache = found(kwargs) if returned is None else returned
        if rows > 1 and self.cache is not None:
            self.prefilled = cache_bytes(self.cache)
            self._last_end = self.now()  # looking at the cache is nobody's time

    def _switch_untimed(self, kind: str) -> None:
        """What meters take is nobody's time."""
        start = self.now()
        self._switch(kind)
        taken = self.now() - start
        self.opened += taken
        if self._last_end is not None:
            self._last_end += taken

    def _switch(self, kind: str | None) -> None:
        """End the meters of the phase that runs, start those of `kind`."""
        if self._meters is not None and self._kind is not None:
            resident, cuda = self._meters
            resident.stop()
            phase = self.phases[self._kind]
            phase.resident_peak_bytes = _higher(phase.resident_peak_bytes, resident.peak)
            if phase.resident_before_bytes is None:
                phase.resident_before_bytes = resident.before
            if cuda is not None:
                cuda.stop()
                phase.cuda_peak_bytes = _higher(phase.cuda_peak_bytes, cuda.peak)
                if phase.cuda_before_bytes is None:
                    phase.cuda_before_bytes = cuda.before
        self._kind, self._meters = kind, None
        if kind is None:
            return
        resident, cuda = resident_meter(self.exact), cuda_meter(self.device, self.exact)
        self.resident_method = resident.method
        resident.start()
        if cuda is not None:
            cuda.start()
        self._meters = resident, cuda


def _fed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Batch rows and tokens of a forward's input.

    Raises:
        TypeError: a forward without ids or embeddings.
    """
    given = kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds")
    if given is None and args:
        given = args[0]
    if not isinstance(given, Tensor) or given.dim() < 2:
        raise TypeError(f"a profiled forward must be given input_ids or inputs_embeds, got {type(given).__name__}")
    return given.shape[0], given.shape[1]


def _higher(one: int | None, other: int | None) -> int | None:
    return max(one, other) if one is not None and other is not None else one if other is None else other
