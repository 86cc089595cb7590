"""A tiny model under the name that snippets load."""

import json
from pathlib import Path

import pytest

from kvpress.models.convert import MANIFEST, MANIFEST_VERSION
from kvpress.models.packaged import PACKAGED_MODELS
from kvpress.testing.tiny_checkpoint import save_tiny_checkpoint


@pytest.fixture
def tiny_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder in which `smollm2` is a tiny random model."""
    packaged = PACKAGED_MODELS["smollm2"]
    folder = tmp_path / "models" / packaged.folder
    save_tiny_checkpoint(folder)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    manifest = {"version": MANIFEST_VERSION, "source": packaged.sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setenv("KVPRESS_CACHE_HOME", str(tmp_path))
