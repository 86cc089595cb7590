"""When each new token of a `generate` call arrived."""

import time
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


class GenerationTimer(BaseStreamer):
    """Pass as `model.generate(..., streamer=timer)`; one prompt, no beams. Starts at construction.

    Attributes:
        started: `time.perf_counter()` at construction, in seconds.
        arrivals: the same clock at each new token, in seconds. `generate` first hands over the prompt, not counted.
    """

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self._prompt_seen = False
        self.started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.arrivals.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to flush."""

    @property
    def prefill_seconds(self) -> float:
        """From the start to the first new token."""
        return self.arrivals[0] - self.started

    @property
    def token_milliseconds(self) -> float | None:
        """Mean time of the tokens after the first; None when there is no second one."""
        further = len(self.arrivals) - 1
        return 1000 * (self.arrivals[-1] - self.arrivals[0]) / further if further > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """The two figures under their own names."""
        return {"prefill_seconds": self.prefill_seconds, "token_milliseconds": self.token_milliseconds}
