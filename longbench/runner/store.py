"""The folder of one run: settings, one JSON line per result, rows left out, and totals.

`run.json` says what was run; `samples.jsonl` grows by one line per result, on disk before the next starts;
`skipped.jsonl` and `totals.json` are written whole. A line that a kill tore is cut off when the run resumes.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import DataError
from ..sample import Skipped
from .versions import versions

FORMAT = 1


class ResultStore:
    """Results of one run in a folder; open it with `with`, so that two runs cannot write to it at once.

    Args:
        folder: made if it does not exist.
        settings: what makes results comparable (benchmark, model, seed, mode, ...); JSON values only.
        command: the command line, kept for the report.

    Raises:
        ValueError: the folder holds results of other settings; names the field and both values.
        DataError: a line other than the last is not JSON; names file and line.
        RuntimeError: another process is writing to the folder.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, command: Iterable[str] = ()) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(dict(settings)))
        self._command = list(command)
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lines = (self.folder / "samples.jsonl").open("ab")
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lines.close()
            raise RuntimeError(f"{self.folder}: another run is writing to this folder") from error
        try:
            self._describe()
            self._recover()
        except BaseException:
            self._lines.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()

    def done(self, method: str) -> set[str]:
        """Ids of the samples that have a result under a method's label."""
        return {row["sample"] for row in self.rows if row["method"] == method}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a result; it is on disk when this returns."""
        full = {**row, "seed": self.settings.get("seed"), "versions": versions()}
        self._lines.write(json.dumps(full, ensure_ascii=False).encode("utf-8") + b"\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self.rows.append(full)

    def write_skipped(self, skipped: Iterable[Skipped]) -> None:
        """Replace the list of rows that were left out."""
        lines = [json.dumps(vars(entry), ensure_ascii=False) + "\n" for entry in skipped]
        self._replace("skipped.jsonl", "".join(lines))

    def write_totals(self, totals: Mapping[str, Any]) -> None:
        """Replace the totals; equal results give equal bytes."""
        self._replace("totals.json", json.dumps(totals, ensure_ascii=False, indent=2, sort_keys=True) + "\n")

    def _describe(self) -> None:
        path = self.folder / "run.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        commands = [self._command] if self._command else []
        if before is not None:
            if before.get("format") != FORMAT:
                raise ValueError(f"{path}: format must be {FORMAT}, not {before.get('format')!r}")
            for name in sorted({*before["settings"], *self.settings}):
                old, new = before["settings"].get(name), self.settings.get(name)
                if old != new:
                    raise ValueError(f"{path}: {name} was {old!r} in this folder and is {new!r} now; choose another")
            commands = before["commands"] + [command for command in commands if command not in before["commands"]]
        description = {"format": FORMAT, "settings": self.settings, "commands": commands, "versions": versions()}
        self._replace("run.json", json.dumps(description, ensure_ascii=False, indent=2) + "\n")

    def _recover(self) -> None:
        path = self.folder / "samples.jsonl"
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._lines.truncate(whole)
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                row["method"], row["sample"]
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path}:{number}: not a result line") from error
            self.rows.append(row)

    def _replace(self, name: str, text: str) -> None:
        temporary = self.folder / f".{name}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / name)
