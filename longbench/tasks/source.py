"""Where LongBench's files come from: a folder, or the hub's archive."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, require
from ..sample import Skipped
from .rows import Row, read_rows

HUB_ID = "THUDM/LongBench"
HUB_ARCHIVE = "data.zip"


@dataclass(frozen=True)
class Source:
    """A folder of `<task>.jsonl` files (or its parent), or an archive of them; `revision` if it is the hub's."""

    path: Path
    revision: str | None = None

    def rows(self, name: str) -> Iterator[tuple[int, Row] | Skipped]:
        """Rows of the file `<name>.jsonl`."""
        if self.path.is_dir():
            found = [
                path for path in (self.path / f"{name}.jsonl", self.path / "data" / f"{name}.jsonl") if path.is_file()
            ]
            if found:
                yield from read_rows(found[0])
            else:
                yield Skipped(str(self.path / f"{name}.jsonl"), None, "no such file")
            return
        try:
            with zipfile.ZipFile(self.path) as archive:
                member = next((m for m in archive.namelist() if m.rpartition("/")[2] == f"{name}.jsonl"), None)
                text = archive.read(member).decode("utf-8") if member else None
        except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: not a readable archive ({error})") from error
        if text is None:
            yield Skipped(str(self.path), None, f"holds no {name}.jsonl")
        else:
            yield from read_rows(self.path / f"{name}.jsonl", text)


def local_source(path: Path) -> Source:
    """A folder or a zip archive on disk.

    Raises:
        DataError: there is no such folder or file.
    """
    if not path.exists():
        raise DataError(f"{path}: no such folder or archive of LongBench files")
    return Source(path)


def hub_source(repository: str = HUB_ID, *, filename: str = HUB_ARCHIVE, revision: str = "main") -> Source:
    """Download one data file from the Hugging Face hub; no code of the repository is run.

    The commit that `revision` stood for is kept, so that results name the data they were made from.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", "eval", "Downloading a benchmark")
    path = Path(hub.hf_hub_download(repository, filename, repo_type="dataset", revision=revision))
    commit = path.parent.name if path.parent.parent.name == "snapshots" else revision
    return Source(path, commit)
