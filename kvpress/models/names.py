"""What a model's name may be, and what is said of one that leads nowhere."""

import difflib
from pathlib import Path

from kvpress.models.errors import ModelLoadError
from kvpress.models.packaged import PACKAGED_MODELS


def existing_path(name: str | Path) -> Path | None:
    """The folder or `.gguf` file that `name` is; `None` for a packaged model and for a hub id.

    Raises:
        ModelLoadError: it can only be a path, and there is nothing.
    """
    path = Path(name).expanduser()
    if str(name) in PACKAGED_MODELS:
        return None
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"model {str(name)!r}: there is no such file")
        return path
    if path.is_dir():
        return path
    if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        what = "is neither a folder nor a .gguf file" if path.exists() else "there is no such folder"
        raise ModelLoadError(f"model {str(name)!r}: {what}")
    return None


def choices(name: str | Path) -> str:
    """What a model can be, in brackets, and the packaged one of a near name."""
    near = difflib.get_close_matches(str(name).lower(), PACKAGED_MODELS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    packaged = ", ".join(PACKAGED_MODELS)
    return f"(a model is a packaged name ({packaged}), a local folder, a .gguf file or a hub id{hint})"
