"""Each process has a private folder; folders of dead owners go, those of living ones stay."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvpress.offload import BlockKey, BlockLayout, Offload, TierManager, TierWriteError
from kvpress.offload.disk import DiskTier
from kvpress.offload.namespace import FOREIGN_AGE_SECONDS, OWNER_FILE, Namespace, Owner, remove_orphans

TENSORS = {"key": torch.arange(64, dtype=torch.float32)}
LAYOUT = BlockLayout.of(TENSORS)


def test_folders_and_files_are_private(tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    with TierManager(Offload(disk=root)) as manager:
        manager.put(BlockKey("cache", 0, 0), TENSORS, "cache")
        (folder,) = root.iterdir()
        assert stat.S_IMODE(root.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
        files = sorted(folder.iterdir())
        assert {path.name for path in files} == {OWNER_FILE, BlockKey("cache", 0, 0).digest}
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert list(root.iterdir()) == []


def test_a_folder_is_private_whatever_the_umask(tmp_path: Path, in_child: Callable[..., tuple[int, str]]) -> None:
    def work() -> str:
        os.umask(0)
        namespace = Namespace(tmp_path / "root")
        return oct(stat.S_IMODE(namespace.path.stat().st_mode) | stat.S_IMODE((tmp_path / "root").stat().st_mode))

    assert in_child(work) == (0, "0o700")


@pytest.mark.parametrize("root", ["", "a\0b"])
def test_a_bad_root_is_refused(root: str) -> None:
    with pytest.raises(ValueError, match="disk must be"):
        Namespace(root)


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="disk must be the path of a directory"):
        Namespace(tmp_path / "file")
    with pytest.raises(OSError, match="Not a directory"):
        Namespace(tmp_path / "file" / "below")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match=r"(?i)symbolic links|symlink|exists"):
        Namespace(tmp_path / "loop")


def test_links_in_the_root_are_resolved_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    namespace = Namespace(tmp_path / "link" / ".." / "link")
    assert namespace.path.parent == (tmp_path / "real").resolve()
    namespace.close()


def make_folder(root: Path, name: str, owner: object, age: float = 0.0) -> Path:
    folder = root / f"kvpress-{name}"
    folder.mkdir(mode=0o700)
    if owner is not None:
        (folder / OWNER_FILE).write_text(owner if isinstance(owner, str) else json.dumps(owner))
    then = time.time() - age
    os.utime(folder, (then, then))
    return folder


def test_only_the_dead_are_cleaned_up(tmp_path: Path) -> None:
    me = Owner.current()
    facts = {"machine": me.machine, "process": me.process, "started": me.started}
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("x")
    stay = [
        make_folder(tmp_path, "lives", facts),
        make_folder(tmp_path, "lives-long", facts, age=2 * FOREIGN_AGE_SECONDS),
        make_folder(tmp_path, "foreign", {**facts, "machine": "another"}, age=FOREIGN_AGE_SECONDS / 2),
        make_folder(tmp_path, "being-made", None),
        make_folder(tmp_path, "garbled", "{"),
        make_folder(tmp_path, "deep", "[" * 4000),
        tmp_path / "outside",
    ]
    link = tmp_path / "kvpress-link"
    link.symlink_to(tmp_path / "outside")
    go = [
        make_folder(tmp_path, "number-used-again", {**facts, "started": me.started - 1000.0}),
        make_folder(tmp_path, "dead", {**facts, "process": 2**22 + 5}),
        make_folder(tmp_path, "foreign-old", {**facts, "machine": "another"}, age=2 * FOREIGN_AGE_SECONDS),
        make_folder(tmp_path, "never-made", None, age=2 * FOREIGN_AGE_SECONDS),
        make_folder(tmp_path, "garbled-old", "{", age=2 * FOREIGN_AGE_SECONDS),
    ]
    (go[0] / "link").symlink_to(tmp_path / "outside")
    assert sorted(remove_orphans(tmp_path)) == sorted(go)
    assert all(folder.is_dir() for folder in stay) and not any(folder.exists() for folder in go)
    assert link.is_symlink() and (tmp_path / "outside" / "precious").exists()


CHILD = """
import sys, torch
from kvpress.offload import BlockKey, Offload, TierManager
manager = TierManager(Offload(disk=sys.argv[1]))
manager.put(BlockKey("cache", 0, 0), {"key": torch.full((64,), float(sys.argv[2]))}, "cache")
print("ready", flush=True)
sys.stdin.readline()
out = {"key": torch.zeros(64)}
assert manager.read_into(BlockKey("cache", 0, 0), out)
print(out["key"].unique().tolist(), flush=True)
if sys.argv[2] == "2":
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""  # the first child ends without close(): the folder must go at interpreter exit


def test_two_processes_with_the_same_keys_do_not_meet(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    children = [subprocess.Popen([*command, number], **pipes, text=True) for number in ("1", "2")]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    assert remove_orphans(tmp_path) == []
    folders = set(tmp_path.iterdir())
    assert len(folders) == 2
    for child, number in zip(children, ("1", "2"), strict=True):
        out, _ = child.communicate("go\n", timeout=60)
        assert out == f"[{number}.0]\n"
    assert children[0].returncode == 0 and children[1].returncode == -9
    (left,) = tmp_path.iterdir()  # the killed one's
    assert left in folders
    assert remove_orphans(tmp_path) == [left] and list(tmp_path.iterdir()) == []


def test_the_limit_counts_the_owner_file_too(tmp_path: Path, bytes_in: Callable[[Path], int]) -> None:
    with pytest.raises(ValueError, match="disk_limit must be at least"):
        DiskTier(tmp_path, limit=10)
    assert list(tmp_path.iterdir()) == []
    tier = DiskTier(tmp_path, limit=None)
    assert tier.ledger.statistics().bytes == bytes_in(tmp_path) > 0
    tier.close()


def test_a_removed_directory_is_a_typed_error(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, limit=None)
    key = BlockKey("cache", 0, 0)
    tier.path.rename(tmp_path / "gone")
    for path in (tmp_path / "gone").iterdir():
        path.unlink()
    (tmp_path / "gone").rmdir()  # chmod proves nothing as root; a removed directory takes no file from anybody
    assert tier.ledger.reserve(tier.size(key, LAYOUT))
    before = tier.ledger.statistics().bytes
    with pytest.raises(TierWriteError, match="No such file"):
        tier.write(key, LAYOUT, TENSORS)
    assert tier.ledger.statistics().bytes == before - tier.size(key, LAYOUT)
    tier.close()
