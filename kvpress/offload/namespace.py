"""One private folder for each process, and the removal of folders whose owner is dead."""

import fcntl
import json
import os
import secrets
import shutil
import socket
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

PREFIX = "kvpress-"
OWNER_FILE = "owner.json"
MAX_OWNER_BYTES = 4096
FOREIGN_AGE_SECONDS = 7 * 24 * 3600.0  # owners on another machine cannot be asked whether they live


@dataclass(frozen=True)
class Owner:
    """The process a folder belongs to. A process id alone would be reused; with its start time it is unique."""

    machine: str
    process: int
    started: float

    @classmethod
    def current(cls) -> "Owner":
        return cls(_machine(), os.getpid(), psutil.Process().create_time())

    def is_alive(self) -> bool:
        """True when the process still runs. Only meaningful on the owner's own machine."""
        try:
            started: float = psutil.Process(self.process).create_time()
            return abs(started - self.started) < 2.0
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True


class Namespace:
    """A folder `root/kvpress-<process>-<random>` of mode 0700 that only this process writes to.

    Args:
        root: where the folder is made; created with mode 0700 when missing. Raises ValueError for a path that is
            not a directory or holds a NUL, and OSError when the folder cannot be made.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = resolved_root(root)
        remove_orphans(self.root)
        self.path = self.root / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        self.path.mkdir(mode=0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._lock = os.open(self.path / OWNER_FILE, flags, 0o600)
            # The kernel drops this lock when the owner ends, however it ends; forked children keep it.
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            text = json.dumps(asdict(Owner.current())).encode()
            os.write(self._lock, text)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        self.owner_bytes = len(text)

    def close(self) -> None:
        """Remove the folder with everything in it. Closing twice is no error."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            # rmtree works on open handles and refuses a link put in the folder's place.
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)


def resolved_root(root: str | os.PathLike[str]) -> Path:
    """The directory `root`, created with mode 0700 if missing, with links and `..` resolved once and for all."""
    text = os.fspath(root)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"disk must be the path of a directory, got {root!r}")
    path = Path(text).expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True) if not path.exists() else None
    path = path.resolve(strict=True)
    if not path.is_dir():
        raise ValueError(f"disk must be the path of a directory, got {root!r}")
    return path


def remove_orphans(root: Path) -> list[Path]:
    """Remove the folders in `root` whose owner is dead, and return them. Living owners are never touched."""
    removed = []
    for folder in sorted(root.glob(f"{PREFIX}*")):
        with suppress(OSError):
            status = folder.stat(follow_symlinks=False)
            mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if mine and _is_orphan(folder, age=time.time() - status.st_mtime):
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


def _is_orphan(folder: Path, age: float) -> bool:
    try:
        file = os.open(folder / OWNER_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return age > FOREIGN_AGE_SECONDS  # no owner file yet: perhaps its owner is just making it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = Owner(**json.loads(os.read(file, MAX_OWNER_BYTES)))
        if owner.machine == _machine():
            return not owner.is_alive()
    except BlockingIOError:
        return False
    except (ValueError, TypeError, RecursionError, OSError):
        pass
    finally:
        os.close(file)
    return age > FOREIGN_AGE_SECONDS


def _machine() -> str:
    """Host, boot and process-id namespace: within one of these a process id means one process."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)
