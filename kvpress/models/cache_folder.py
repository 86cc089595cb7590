"""Where converted models live between runs."""

import os
from pathlib import Path

from platformdirs import user_cache_path

ENVIRONMENT_VARIABLE = "KVPRESS_CACHE_HOME"


def cache_home() -> Path:
    """The folder of everything kvpress keeps between runs: `$KVPRESS_CACHE_HOME`, else the platform's user cache.

    The folder is not created here.

    Raises:
        ValueError: the variable names something that exists and is not a folder.
    """
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    folder = Path(chosen).expanduser() if chosen else user_cache_path("kvpress-cache", appauthor=False)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must name a folder, but {str(folder)!r} is a file")
    return folder
