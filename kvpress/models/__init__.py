"""Models to try policies on: `load_model` takes a hub id, a local folder, a GGUF file or a packaged model's name."""

from kvpress.models.errors import ModelLoadError
from kvpress.models.load import load_model

__all__ = ["ModelLoadError", "load_model"]
