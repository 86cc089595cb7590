"""One block file: a safetensors file whose checksum covers every byte of it, the header included.

    8 bytes   length of the header, little endian
    header    JSON, padded with blanks to a multiple of 8: `__metadata__` with `_checksum`, `_type`, `_version`
              and `key` (the block key's full description), then one entry for each tensor
    payload   the tensors in the order of `BlockLayout`, with no holes

Any safetensors reader can open it. The header is written here and not by that library for two reasons: the
payload goes from the tensors to the file, and back into preallocated tensors, without a copy of the whole; and
the header is canonical, so that it can be checked byte by byte against the header the reader expects.

The checksum is XXH3 with 128 bits over the whole file with the 32 checksum digits taken as zeros. Measured on one
core it runs at 16 GB/s, as fast as CRC32C does with its own instruction and five times as fast as zlib's CRC-32, and
it leaves 2^-128 and not 2^-32 for a random change to pass unseen. It is no protection against a forger.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ELOOP
from functools import lru_cache

import xxhash
from torch import Tensor

from kvpress.offload.errors import TierCorruptError, TierLostError
from kvpress.offload.key import FORMAT_VERSION, BlockKey
from kvpress.offload.layout import DTYPE_NAMES, DTYPES, BlockLayout, chunks_of, memory_of
from kvpress.offload.slot_rows import runs
from kvpress.offload.store import FileStore, OpenFile

TYPE = "kvpress.block"
MAX_HEADER_BYTES = 64 << 10
BLANK_CHECKSUM = "0" * 32
_BEFORE_CHECKSUM = 8 + len('{"__metadata__":{"_checksum":"')
_CHECKSUM = slice(_BEFORE_CHECKSUM, _BEFORE_CHECKSUM + len(BLANK_CHECKSUM))


@dataclass(frozen=True)
class Header:
    """What a block file says of itself: the description of its key, its layout, and its checksum in hex."""

    key: str
    layout: BlockLayout
    checksum: str = BLANK_CHECKSUM

    def encode(self) -> bytes:
        """The length prefix and the header. Raises ValueError when it is longer than `MAX_HEADER_BYTES`."""
        metadata = {"_checksum": self.checksum, "_type": TYPE, "_version": str(FORMAT_VERSION), "key": self.key}
        start = json.dumps({"__metadata__": metadata}, separators=(",", ":")).encode()
        text = start[:-1] + b"," + _table(self.layout)
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER_BYTES:
            raise ValueError(f"the header must have at most {MAX_HEADER_BYTES} bytes, got {len(text)}")
        return len(text).to_bytes(8, "little") + text

    @classmethod
    def decode(cls, text: bytes) -> "Header":
        """Read a header without its length prefix. Raises ValueError for anything that `encode` would not write."""
        try:
            table = json.loads(text)
            metadata = table.pop("__metadata__")
            if metadata["_type"] != TYPE:
                raise ValueError(f"_type must be {TYPE!r}, got {metadata['_type']!r}")
            if metadata["_version"] != str(FORMAT_VERSION):
                raise ValueError(f"_version must be {FORMAT_VERSION}, got {metadata['_version']!r}")
            entries = {name: (DTYPES[e["dtype"]], tuple(e["shape"])) for name, e in table.items()}
            sizes = [size for _, shape in entries.values() for size in shape]
            if not all(type(size) is int and size >= 0 for size in sizes) or type(metadata["key"]) is not str:
                raise ValueError("the header is malformed")
            header = cls(metadata["key"], BlockLayout.from_specifications(entries), metadata["_checksum"])
            if header.encode()[8:] != text:
                raise ValueError("the header is not in its canonical form")
        except ValueError:
            raise
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"the header is malformed ({type(error).__name__}: {error})") from error
        return header


@lru_cache(maxsize=256)  # blocks are many, their layouts few
def _table(layout: BlockLayout) -> bytes:
    """The part of the header that describes the tensors, with the brace that ends it."""
    table = {
        place.name: {
            "dtype": DTYPE_NAMES[place.dtype],
            "shape": list(place.shape),
            "data_offsets": [place.start, place.stop],
        }
        for place in layout.places
    }
    return json.dumps(table, separators=(",", ":")).encode()[1:]


def header_bytes(key: str, layout: BlockLayout) -> int:
    """Bytes of the block file before the tensors."""
    return len(Header(key, layout).encode())


def file_bytes(key: str, layout: BlockLayout) -> int:
    """Size of the block file in bytes, known before it is written."""
    return header_bytes(key, layout) + layout.nbytes


def write_block(store: FileStore, name: str, key: str, layout: BlockLayout, tensors: Mapping[str, Tensor]) -> int:
    """Write a block file atomically and return its size in bytes. Raises OSError, ValueError."""
    layout.check(tensors)
    header = Header(key, layout).encode()
    checksum = xxhash.xxh3_128(header)
    for chunk in chunks_of(layout, tensors):
        checksum.update(chunk)

    def chunks() -> Iterator[memoryview | bytes]:
        yield Header(key, layout, checksum.hexdigest()).encode()
        yield from chunks_of(layout, tensors)

    return store.write_atomic(name, chunks())


def read_block(store: FileStore, name: str, key: str, layout: BlockLayout, out: Mapping[str, Tensor]) -> None:
    """Read the block `key` straight into the tensors of `out` (CPU, contiguous, of the layout's dtypes and shapes).

    Raises:
        TierCorruptError: any byte of the file differs from what was written; `out` is then undefined.
        TierLostError: there is no such file.
        OSError: it could not be read; `out` is then undefined.
    """
    layout.check(out)
    for tensor_name, tensor in out.items():
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"out[{tensor_name!r}] must be a contiguous CPU tensor, got one on {tensor.device}")
    blank = Header(key, layout).encode()
    with _opened(store, name, key) as file:
        start = bytearray(len(blank))
        if file.size == len(blank) + layout.nbytes and file.read_into(memoryview(start), 0, bool) == len(blank):
            stored = bytes(start[_CHECKSUM])
            start[_CHECKSUM] = BLANK_CHECKSUM.encode()
            if start == blank:
                _read_payload(file, layout, xxhash.xxh3_128(blank), stored, out, key)
                return
        header, _ = _read_header(file, key)  # says what is wrong with it
        if header.key != key:
            raise TierCorruptError("disk", f"the file holds the block {header.key}", key)
        if header.layout != layout:
            raise TierCorruptError("disk", f"the file holds {header.layout.places}, not {layout.places}", key)
        raise TierCorruptError("disk", "the file changes while it is read", key)


def read_rows(
    store: FileStore, key: BlockKey, start: int, size: int, width: int, numbers: Sequence[int], out: Tensor
) -> None:
    """Read the rows `numbers` of the block `key` of slot rows into `out [n, width]`; nothing else of the file is read.

    Whether they are what was written, each row's own checksum says (`RowLayout.first_damaged`).

    Args:
        start, size: bytes before the rows of the file, and in all.

    Raises:
        TierCorruptError: the file has another size than was written; `out` is then undefined.
        TierLostError: there is no such file.
        OSError: it could not be read; `out` is then undefined.
    """
    description, target, done = key.description(), memory_of(out), 0
    with _opened(store, key.digest, description) as file:
        if file.size != size:
            raise TierCorruptError("disk", f"{file.size} bytes instead of {size}", description)
        for first, count in runs(numbers):
            piece = target[done : done + count * width]
            if file.read_into(piece, start + first * width, bool) < len(piece):
                raise TierCorruptError("disk", "the file ends inside its payload", description)
            done += len(piece)


def load_block(store: FileStore, name: str, allocate: Callable[[int], Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Read a block file of unknown contents: its key's description and its tensors. Raises as `read_block` does.

    `allocate(nbytes)` returns the flat uint8 CPU tensor to read into; the header's sizes have by then been checked
    against the real size of the file, so a damaged header cannot ask for more memory than the file has bytes.
    """
    with _opened(store, name, name) as file:
        header, checksum = _read_header(file, name)
        views = header.layout.views(allocate(header.layout.nbytes))
        _read_payload(file, header.layout, checksum, header.checksum.encode(), views, name)
    return header.key, views


@contextmanager
def _opened(store: FileStore, name: str, key: str) -> Iterator[OpenFile]:
    try:
        with store.open(name) as file:
            if not file.is_regular:
                raise TierCorruptError("disk", "there is something else than a regular file in its place", key)
            yield file
    except FileNotFoundError as error:
        raise TierLostError("disk", "its file has vanished", key) from error
    except OSError as error:
        if error.errno != ELOOP:
            raise
        # The name is opened without following links, so this is a link that somebody put in the file's place.
        raise TierCorruptError("disk", "there is a symbolic link in its place", key) from error


def _read_header(file: OpenFile, key: str) -> tuple[Header, xxhash.xxh3_128]:
    prefix = bytearray(8)
    if file.read_into(memoryview(prefix), 0, bool) < 8:
        raise TierCorruptError("disk", f"the file ends after {file.size} bytes", key)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or 8 + length > file.size:
        raise TierCorruptError("disk", f"a header of {length} bytes in a file of {file.size}", key)
    text = bytearray(length)
    if file.read_into(memoryview(text), 8, bool) < length:
        raise TierCorruptError("disk", "the file ends inside its header", key)
    try:
        header = Header.decode(bytes(text))
        blank = Header(header.key, header.layout).encode()
    except ValueError as error:
        raise TierCorruptError("disk", str(error), key) from error
    if 8 + length + header.layout.nbytes != file.size:
        raise TierCorruptError("disk", f"{file.size} bytes instead of {8 + length + header.layout.nbytes}", key)
    return header, xxhash.xxh3_128(blank)


def _read_payload(
    file: OpenFile, layout: BlockLayout, checksum: xxhash.xxh3_128, stored: bytes, out: Mapping[str, Tensor], key: str
) -> None:
    start = file.size - layout.nbytes
    for place in layout.places:
        if place.stop > place.start:
            wanted = place.stop - place.start
            if file.read_into(memory_of(out[place.name]), start + place.start, checksum.update) < wanted:
                raise TierCorruptError("disk", "the file ends inside its payload", key)
    if checksum.hexdigest().encode() != stored:
        raise TierCorruptError("disk", "its checksum does not match its bytes", key)
