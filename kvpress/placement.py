"""Where the layers of a model compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpress.errors import UnsupportedModelError


def layer_devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Device on which each layer's attention runs, by the index of the layer; layers without parameters are left out.

    That is where its weights are or, where accelerate keeps them elsewhere between forwards (`device_map` with `"cpu"` or `"disk"`), where
    it brings them to.
    """
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index not in devices:
            found = next(_devices(module), None)
            if found is not None:
                devices[index] = found
    return devices


def one_device(model: PreTrainedModel) -> torch.device:
    """The device of all layers.

    Raises:
        UnsupportedModelError: layers on several devices.
    """
    found = sorted(set(layer_devices(model).values()), key=str)
    if len(found) > 1:
        raise UnsupportedModelError(
            f"offload must be None for a model that lies on several devices, this one is on {[str(device) for device in found]}"
        )
    return found[0] if found else model.device


def _devices(module: nn.Module) -> Iterator[torch.device]:
    for part in module.modules():
        parameter = next(part.parameters(recurse=False), None)
        if parameter is None:
            continue
        hook: Any = getattr(part, "_hf_hook", None)
        if parameter.device.type == "meta" and getattr(hook, "execution_device", None) is not None:
            yield torch.device(hook.execution_device)  # a number counts accelerators
        else:
            yield parameter.device
