"""What a user says about offloading."""

import os
from dataclasses import dataclass

from kvpress.policies.budget import parse_bytes


@dataclass(frozen=True)
class Offload:
    """Limits of the three tiers. Blocks fill the first tier and move down when it is full.

    A tier that is None is not used, and at least one must be. Sizes are bytes, or text such as "256MB" or "1.5GiB".

    Args:
        device: memory of the device that computes, for blocks kept close to it; without a GPU this is host memory.
        host: host memory, pinned where there is a GPU, counted with the allocator's rounding.
        disk: directory under which each process makes its own private folder.
        disk_limit: bytes of all files in that folder; None leaves it to the file system.
        block: slots in one block, >= 1.
        prefetch: layers to read ahead of the one that computes, >= 0.
    """

    device: int | str | None = None
    host: int | str | None = None
    disk: str | os.PathLike[str] | None = None
    disk_limit: int | str | None = None
    block: int = 256
    prefetch: int = 1

    def __post_init__(self) -> None:
        for name in ("device", "host", "disk_limit"):
            _bytes(name, getattr(self, name))
        path = os.fspath(self.disk) if isinstance(self.disk, str | os.PathLike) else ""
        if self.disk is not None and (not isinstance(path, str) or not path or "\0" in path):
            raise ValueError(f"disk must be the path of a directory or None, got {self.disk!r}")
        if self.device is None and self.host is None and self.disk is None:
            raise ValueError("device, host or disk must be given, got None for all three")
        if self.disk is None and self.disk_limit is not None:
            raise ValueError(f"disk_limit needs disk to be given, got disk_limit={self.disk_limit!r} and disk=None")
        for name, least in (("block", 1), ("prefetch", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    @property
    def device_bytes(self) -> int | None:
        """The limit of the device tier in bytes, or None without one."""
        return _bytes("device", self.device)

    @property
    def host_bytes(self) -> int | None:
        """The limit of the host tier in bytes, or None without one."""
        return _bytes("host", self.host)

    @property
    def disk_bytes(self) -> int | None:
        """The limit of the disk tier in bytes, or None without one."""
        return _bytes("disk_limit", self.disk_limit)


def _bytes(name: str, value: int | str | None) -> int | None:
    if value is None:
        return None
    return parse_bytes(value, field=name)
