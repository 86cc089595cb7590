"""Read a GGUF file into an ordinary dense transformers model and its tokenizer."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from kvpress.models.errors import ModelLoadError


def read_gguf(path: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a GGUF file with its weights unpacked, so that the model can be saved and moved like any other.

    Args:
        path: the `.gguf` file.
        dtype: dtype of the weights; None means float32.

    Returns:
        (model on the CPU, tokenizer).

    Raises:
        ModelLoadError: gguf or accelerate is not installed, or transformers cannot read the file.
    """
    require_gguf_packages()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(path.parent), path.name
    try:
        with redirect_stderr(io.StringIO()):  # the reader draws a tqdm bar that has no switch
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=name,
                dtype=dtype or torch.float32,
                device_map={"": "cpu"},
                quantization_config=GgufConfig(dequantize=True),
            )
    except (OSError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise ModelLoadError(f"{str(path)!r} could not be read as a GGUF model: {error}") from error
    forget_quantizer(model)
    return model, tokenizer


def forget_quantizer(model: Any) -> None:
    """Drop the marks of the GGUF reader: the weights are dense, yet `save_pretrained` refuses because of them."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def require_gguf_packages() -> None:
    """Say which package is missing before transformers does so with a longer trace."""
    from importlib.util import find_spec

    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelLoadError(f"reading a GGUF file needs {' and '.join(missing)}: pip install 'kvpress-cache[demo]'")
