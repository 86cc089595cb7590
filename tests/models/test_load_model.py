"""`load_model`: every place a model can come from, and what is refused."""

from pathlib import Path

import pytest
import torch

from kvpress.models import ModelLoadError, load_model
from kvpress.models.cache_folder import cache_home
from kvpress.models.convert import is_complete
from kvpress.models.names import choices
from kvpress.models.packaged import PACKAGED_MODELS
from kvpress.testing.tiny_checkpoint import save_tiny_checkpoint, save_tiny_gguf, tiny_model, tiny_tokenizer

TEXT = "The pass key is 12345.\n\nnaïve 中文"


def same_weights(model: torch.nn.Module) -> bool:
    expected, found = tiny_model().state_dict(), model.state_dict()
    return expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_local_folder_gives_the_saved_model(tmp_path: Path) -> None:
    model, tokenizer = load_model(save_tiny_checkpoint(tmp_path), device="cpu")
    assert same_weights(model)
    assert not model.training
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]


def test_a_gguf_file_gives_a_dense_model_that_can_be_saved(tmp_path: Path) -> None:
    model, tokenizer = load_model(save_tiny_gguf(tmp_path / "tiny.gguf"), device="cpu")
    assert same_weights(model)
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
    model.save_pretrained(tmp_path / "saved")  # refused by transformers while the quantizer's marks are there
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), (torch.float64, torch.float64)])
def test_dtype_is_the_one_asked_for(tmp_path: Path, dtype: object, expected: torch.dtype) -> None:
    model, _ = load_model(save_tiny_checkpoint(tmp_path), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float12"}, "dtype must be one of float32"),
        ({"dtype": torch.int8}, "dtype must be one of float32"),
        ({"device": "abacus"}, "device must be a torch device"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model("there/is/no/such/model", **options)  # type: ignore[arg-type]


def test_a_missing_model_names_itself_and_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match="no such file"):
        load_model(tmp_path / "absent.gguf")
    with pytest.raises(ModelLoadError, match=r"model .*empty.* could not be loaded.*smollm2"):
        (tmp_path / "empty").mkdir()
        load_model(tmp_path / "empty")
    with pytest.raises(ModelLoadError, match="no such folder"):
        load_model(str(tmp_path / "absent"))
    with pytest.raises(ModelLoadError, match=r"'\./absent': there is no such folder"):
        load_model("./absent")
    (tmp_path / "file.bin").touch()
    with pytest.raises(ModelLoadError, match=r"neither a folder nor a \.gguf file"):
        load_model(tmp_path / "file.bin")
    assert "did you mean 'smollm2'?" in choices("SmolM2") and "did you mean" not in choices("gpt2")


def test_a_damaged_gguf_file_is_a_load_error(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + b"\x00" * 64)
    with pytest.raises(ModelLoadError, match=r"damaged\.gguf"):
        load_model(damaged)


def test_cache_home_follows_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPRESS_CACHE_HOME", str(tmp_path / "here"))
    assert cache_home() == tmp_path / "here"
    monkeypatch.delenv("KVPRESS_CACHE_HOME")
    assert cache_home().name == "kvpress-cache"
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVPRESS_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="KVPRESS_CACHE_HOME must name a folder"):
        cache_home()


@pytest.mark.real_model
def test_the_real_smollm2_knows_the_capital_of_france() -> None:
    packaged = PACKAGED_MODELS["smollm2"]
    if not is_complete(cache_home() / "models" / packaged.folder, packaged.sha256):
        pytest.skip("SmolLM2 is not in the cache folder: `make demo` fetches it")
    model, tokenizer = load_model("smollm2", device="cpu")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert ids["input_ids"].shape == (1, 5)
    output = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
