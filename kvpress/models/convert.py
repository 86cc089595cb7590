"""Convert a GGUF file to a safetensors folder once, atomically, safe against a second process doing the same."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from kvpress.console import step
from kvpress.models.errors import ModelLoadError
from kvpress.models.gguf_file import read_gguf

MANIFEST = "kvpress.json"
MANIFEST_VERSION = 1
PROBE = "Hello world, the pass key is 90210.\n\n\tWords ending; 3.14 <|im_start|>naïve 中文 (x_1 == y)\n"


def converted_folder(folder: Path, source: str, fetch_gguf: Callable[[Path], Path]) -> Path:
    """The folder of a converted model; converts on the first call and only looks on every later one.

    Two processes may ask at once: the second waits for the first, then finds the folder. The folder appears by a
    rename after everything in it was written and read back, so a half-made one is never seen.

    Args:
        folder: where the converted model is to lie.
        source: identity of the source (a checksum); a folder of another source is replaced.
        fetch_gguf: called with an empty scratch folder, returns the GGUF file to convert.

    Raises:
        ModelLoadError: fetching or converting failed; nothing is left behind.
    """
    if is_complete(folder, source):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if is_complete(folder, source):
            return folder
        # We hold the lock, so whatever an interrupted process left is nobody's.
        for stale in folder.parent.glob(folder.name + ".partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=folder.name + ".partial-", dir=folder.parent) as scratch:
            fetched, result = Path(scratch) / "source", Path(scratch) / "result"
            fetched.mkdir()
            convert(fetch_gguf(fetched), result, source)
            if folder.exists():
                shutil.rmtree(folder)
            result.rename(folder)
    return folder


def convert(gguf: Path, folder: Path, source: str) -> None:
    """Write model and tokenizer of a GGUF file to `folder`, read both back, compare, and write the manifest last."""
    with step("Unpacking the GGUF weights and rebuilding the tokenizer"):
        model, tokenizer = read_gguf(gguf)
    with step("Saving as safetensors and checking the copy"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check_same_tokenizer(tokenizer, folder)
        check_same_weights(model, folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {"version": MANIFEST_VERSION, "source": source, "files": sizes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def is_complete(folder: Path, source: str) -> bool:
    """Whether `folder` is a finished conversion of `source`: the manifest is readable and every file has its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != MANIFEST_VERSION or manifest["source"] != source:
            return False
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_same_tokenizer(tokenizer: Any, folder: Path) -> None:
    """A tokenizer saved from GGUF can come back as another class that splits otherwise, without any error.

    Raises:
        ModelLoadError: the saved tokenizer gives other ids for a probe text.
    """
    from transformers import AutoTokenizer

    reloaded = AutoTokenizer.from_pretrained(folder)
    expected, found = tokenizer(PROBE)["input_ids"], reloaded(PROBE)["input_ids"]
    if expected != found:
        raise ModelLoadError(
            f"the tokenizer saved to {str(folder)!r} came back as {type(reloaded).__name__} and splits text "
            f"differently ({len(found)} ids instead of {len(expected)}): the conversion is thrown away"
        )


def check_same_weights(model: Any, folder: Path) -> None:
    """Raises ModelLoadError when a tensor of the saved model differs from the one in memory."""
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in reloaded or not torch.equal(tensor, reloaded[name]):
            raise ModelLoadError(f"weight {name!r} saved to {str(folder)!r} differs: the conversion is thrown away")
