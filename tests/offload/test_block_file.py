"""A block file gives back exactly what was written, and any other file is refused."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kvpress.offload import BlockKey, BlockLayout, TierCorruptError, TierLostError
from kvpress.offload import format as block_format
from kvpress.offload.format import MAX_HEADER_BYTES, Header, file_bytes, load_block, read_block, write_block
from kvpress.offload.layout import DTYPE_NAMES
from kvpress.offload.store import FileStore

KEY = BlockKey("cache", layer=1, block=2, generation=3, context='model "x" \\ é')
NAME = KEY.digest


def empty_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 1).contiguous() for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor]) -> tuple[FileStore, BlockLayout, Path]:
    store, layout = FileStore(folder), BlockLayout.of(tensors)
    write_block(store, NAME, KEY.description(), layout, tensors)
    return store, layout, folder / NAME


def read(store: FileStore, layout: BlockLayout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = empty_like(tensors)
    read_block(store, NAME, KEY.description(), layout, out)
    return out


def every_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, dtype in enumerate(DTYPE_NAMES):
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (24,), generator=generator, dtype=torch.uint8)
        tensors[f"t{index}"] = raw.view(dtype).reshape(-1, 1)
    odd = torch.arange(3).to(torch.int8)
    return tensors | {"scalar": torch.tensor(3.5), "nothing": torch.empty(2, 0, 5), "odd": odd}


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, same: Callable[..., bool]) -> None:
    tensors = every_dtype()
    store, layout, path = write(tmp_path, tensors)
    assert same(read(store, layout, tensors), tensors)
    assert not same(empty_like(tensors), tensors)
    assert path.stat().st_size == file_bytes(KEY.description(), layout)
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_safetensors_library_reads_the_same(tmp_path: Path, same: Callable[..., bool]) -> None:
    tensors = every_dtype()
    _, _, path = write(tmp_path, tensors)
    with safe_open(path, framework="pt") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, tensors)
        metadata = file.metadata()
    assert json.loads(metadata["key"]) == json.loads(KEY.description())
    assert metadata["_type"] == "kvpress.block" and metadata["_version"] == "1"


def test_strided_tensors_are_gathered(tmp_path: Path, same: Callable[..., bool]) -> None:
    base = torch.arange(48, dtype=torch.float32).reshape(4, 12)
    tensors = {"a": base.t(), "b": base[:, ::3], "one": base[1, 1:2][::3]}
    assert not tensors["a"].is_contiguous() and not tensors["b"].is_contiguous()
    store, layout, _ = write(tmp_path, tensors)
    packed = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    assert same(read(store, layout, packed), tensors)


def test_a_file_of_unknown_contents_is_loaded(tmp_path: Path, same: Callable[..., bool]) -> None:
    tensors = every_dtype()
    store, _, _ = write(tmp_path, tensors)
    key, loaded = load_block(store, NAME, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    assert key == KEY.description() and same(loaded, tensors)


def test_the_digest_is_sha256_of_everything_in_the_key() -> None:
    assert hashlib.sha256(KEY.description().encode()).hexdigest() == KEY.digest
    others = [
        BlockKey("other", 1, 2, 3, KEY.context),
        BlockKey("cache", 2, 2, 3, KEY.context),
        BlockKey("cache", 1, 3, 3, KEY.context),
        BlockKey("cache", 1, 2, 4, KEY.context),
        BlockKey("cache", 1, 2, 3, "model y"),
    ]
    assert len({key.digest for key in [KEY, *others]}) == 6


def damages(good: bytes, source: random.Random) -> list[bytes]:
    """Every bit flipped, every shorter length, and random damage of several bytes: all different from `good`."""
    found = []
    for index in range(len(good)):
        for bit in range(8):
            found.append(good[:index] + bytes([good[index] ^ (1 << bit)]) + good[index + 1 :])
    found += [good[:length] for length in range(len(good))]
    found += [good + bytes(extra) for extra in range(1, 64)]
    least = len(found) + 4000
    while len(found) < least:
        bad = bytearray(good)
        for _ in range(source.randint(1, 16)):
            bad[source.randrange(len(bad))] = source.randrange(256)
        if source.random() < 0.3:
            bad = bad[: source.randint(1, len(bad))]
        if source.random() < 0.1:
            first, second = sorted(source.sample(range(len(bad) + 1), 2))
            bad[first:second] = bad[first:second][::-1]
        if bytes(bad) != good:
            found.append(bytes(bad))
    return found


def unseen_damages(tmp_path: Path, tensors: dict[str, Tensor]) -> tuple[int, int]:
    store, layout, path = write(tmp_path, tensors)
    good = path.read_bytes()
    out = empty_like(tensors)
    tried = unseen = 0
    with path.open("r+b", buffering=0) as file:
        for bad in damages(good, random.Random(0)):
            os.pwrite(file.fileno(), bad, 0)
            os.ftruncate(file.fileno(), len(bad))
            tried += 1
            try:
                read_block(store, NAME, KEY.description(), layout, out)
                unseen += 1
            except TierCorruptError:
                pass
    path.write_bytes(good)
    read_block(store, NAME, KEY.description(), layout, out)
    return tried, unseen


def test_every_flipped_or_missing_byte_is_caught(tmp_path: Path, tensors_of: Callable[..., dict[str, Tensor]]) -> None:
    tried, unseen = unseen_damages(tmp_path, tensors_of(1, slots=2))
    assert tried >= 10_000
    assert unseen == 0


def test_without_the_checksum_damage_would_pass(
    tmp_path: Path, tensors_of: Callable[..., dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoChecksum:
        def __init__(self, *_: object) -> None:
            pass

        def update(self, _: object) -> None:
            pass

        def hexdigest(self) -> str:
            return "0" * 32

    monkeypatch.setattr(block_format.xxhash, "xxh3_128", NoChecksum)
    tried, unseen = unseen_damages(tmp_path, tensors_of(1, slots=2))
    assert tried >= 10_000
    assert unseen > 500


def reheader(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite a block file with a changed header whose checksum is right again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table.get("__metadata__", {})["_checksum"] = "0" * 32
    change(table)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    blank = len(text).to_bytes(8, "little") + text
    checksum = block_format.xxhash.xxh3_128(blank + data[8 + length :]).hexdigest()
    path.write_bytes(blank.replace(b"0" * 32, checksum.encode(), 1) + data[8 + length :])


CHANGES: dict[str, Callable[[dict], object]] = {
    "future version": lambda t: t["__metadata__"].update(_version="2"),
    "other type": lambda t: t["__metadata__"].update(_type="kvpress.index"),
    "other key": lambda t: t["__metadata__"].update(key=BlockKey("cache", 1, 2, 4, KEY.context).description()),
    "key of another kind": lambda t: t["__metadata__"].update(key=5),
    "other dtype": lambda t: t["key"].update(dtype="F16"),
    "unknown dtype": lambda t: t["key"].update(dtype="F7"),
    "other shape": lambda t: t["key"].update(shape=[3, 2, 4]),
    "negative shape": lambda t: t["key"].update(shape=[-2, -3, 4]),
    "overlapping": lambda t: t["key"].update(data_offsets=[0, 48]),
    "tensor missing": lambda t: t.pop("key"),
    "metadata missing": lambda t: t.pop("__metadata__"),
    "metadata a list": lambda t: t.update(__metadata__=[]),
    "extra metadata": lambda t: t["__metadata__"].update(more="1"),
}


def test_the_rewritten_header_alone_is_no_damage(
    tmp_path: Path, tensors_of: Callable[..., dict[str, Tensor]], same: Callable[..., bool]
) -> None:
    tensors = tensors_of(1)
    store, layout, path = write(tmp_path, tensors)
    reheader(path, lambda table: None)
    assert same(read(store, layout, tensors), tensors)


@pytest.mark.parametrize("change", CHANGES)
def test_a_header_that_promises_something_else_is_refused(
    change: str, tmp_path: Path, tensors_of: Callable[..., dict[str, Tensor]]
) -> None:
    tensors = tensors_of(1)
    store, layout, path = write(tmp_path, tensors)
    reheader(path, CHANGES[change])
    with pytest.raises(TierCorruptError) as caught:
        read(store, layout, tensors)
    assert caught.value.lost and str(caught.value).endswith("the block is lost")


FOREIGN = [
    b"",
    b"\x08",
    (8).to_bytes(8, "little") + b"{}      ",
    (1 << 62).to_bytes(8, "little") + b"{}",
    (MAX_HEADER_BYTES + 8).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 8),
    (60_000).to_bytes(8, "little") + b"[" * 60_000,
    (16).to_bytes(8, "little") + b'{"a":1e999999}  ',
    (8).to_bytes(8, "little") + b'"\xff\xfe"    ',
    b"GGUF" + bytes(100),
    b"\x80\x04\x95" + bytes(100),
]


@pytest.mark.parametrize("content", FOREIGN, ids=range(len(FOREIGN)))
def test_foreign_files_are_refused(
    content: bytes, tmp_path: Path, tensors_of: Callable[..., dict[str, Tensor]]
) -> None:
    tensors = tensors_of(1)
    store, layout, path = write(tmp_path, tensors)
    path.write_bytes(content)
    with pytest.raises(TierCorruptError):
        read(store, layout, tensors)
    with pytest.raises(TierCorruptError):
        load_block(store, NAME, lambda nbytes: pytest.fail("must not allocate"))


def test_what_is_not_a_file_is_refused(tmp_path: Path, tensors_of: Callable[..., dict[str, Tensor]]) -> None:
    tensors = tensors_of(1)
    store, layout, path = write(tmp_path, tensors)
    target = path.rename(tmp_path / "elsewhere")
    with pytest.raises(TierLostError):
        read(store, layout, tensors)
    path.symlink_to(target)  # a good block, but not in this folder's own hands
    with pytest.raises(TierCorruptError, match="symbolic link"):
        read(store, layout, tensors)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(TierCorruptError, match="symbolic link"):
        read(store, layout, tensors)
    path.unlink()
    path.mkdir()
    with pytest.raises(TierCorruptError, match="regular"):
        read(store, layout, tensors)


NAMES = ["", "a", "../" + "a" * 61, "/" + "a" * 63, "A" * 64, "a" * 63 + "\0", "a" * 65, "a" * 63 + "\n"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_are_digests_only(name: str, tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with pytest.raises(ValueError, match="hexadecimal"):
        store.write_atomic(name, [b"x"])
    with pytest.raises(ValueError, match="hexadecimal"), store.open(name):
        pass
    with pytest.raises(ValueError, match="hexadecimal"):
        store.unlink(name)
    with pytest.raises(ValueError, match="hexadecimal"):
        store.stat(name)
    assert list(tmp_path.iterdir()) == []


def test_the_caller_hears_what_is_wrong_with_its_tensors(tmp_path: Path) -> None:
    store, layout = FileStore(tmp_path), BlockLayout.of({"a": torch.zeros(4)})
    with pytest.raises(ValueError, match="at least one tensor"):
        BlockLayout.of({})
    with pytest.raises(ValueError, match="__metadata__"):
        BlockLayout.of({"__metadata__": torch.zeros(1)})
    with pytest.raises(ValueError, match="complex64"):
        BlockLayout.of({"a": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(TypeError, match="list"):
        BlockLayout.of({"a": [1.0]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="header must have at most"):
        Header(KEY.description(), BlockLayout.of({"n" * 70_000: torch.zeros(1)})).encode()
    write_block(store, NAME, KEY.description(), layout, {"a": torch.zeros(4)})
    with pytest.raises(ValueError, match="match the block"):
        read_block(store, NAME, KEY.description(), layout, {"a": torch.zeros(5)})
    with pytest.raises(ValueError, match="contiguous CPU"):
        read_block(store, NAME, KEY.description(), layout, {"a": torch.zeros(8)[::2]})
    with pytest.raises(ValueError, match="layer must be at least 0, got -1"):
        BlockKey("cache", -1, 0)
    with pytest.raises(TypeError, match="block must be an integer, got True"):
        BlockKey("cache", 0, True)
