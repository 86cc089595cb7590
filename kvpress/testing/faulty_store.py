"""A file store whose system calls fail, stall or kill the process where a test says so."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kvpress.offload.store import STEPS, FileStore

Result = TypeVar("Result")


class FaultyStore(FileStore):
    """A `FileStore` with faults at named steps.

    Attributes:
        errors: step -> errno to fail with.
        times: step -> how often it fails; absent means always.
        kill_at: (step, "before" or "after", n): SIGKILL to this process at the n-th such call, counted from 0.
        delay: step -> seconds to sleep first.
        calls: how often each step ran.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.errors: dict[str, int] = {}
        self.times: dict[str, int] = {}
        self.delay: dict[str, float] = {}
        self.kill_at: tuple[str, str, int] | None = None
        self.calls: Counter[str] = Counter()

    def step(self, name: str, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        if name not in STEPS:
            raise ValueError(f"step must be one of {STEPS}, got {name!r}")
        call = self.calls[name]
        self.calls[name] += 1
        if self.kill_at == (name, "before", call):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.delay.get(name, 0.0))
        if name in self.errors and self.times.get(name, 1) > 0:
            if name in self.times:
                self.times[name] -= 1
            raise OSError(self.errors[name], os.strerror(self.errors[name]))
        result = function(*arguments, **options)
        if self.kill_at == (name, "after", call):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
