"""Wall clock that waits for the device."""

import time

import torch


def now(device: torch.device) -> float:
    """Seconds of wall clock, when everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
