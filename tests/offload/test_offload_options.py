"""An `Offload` is checked when it is made, and says which field is wrong."""

from pathlib import Path

import pytest

from kvpress.offload import Offload


def test_sizes_are_bytes() -> None:
    options = Offload(device="256MB", host="1.5GiB", disk="/data/kv", disk_limit=10**10)
    assert (options.device_bytes, options.host_bytes, options.disk_bytes) == (256 * 10**6, 3 * 2**29, 10**10)
    assert Offload(disk=Path("x")).disk_bytes is None
    assert Offload(host=1).device_bytes is None
    assert hash(options) == hash(Offload(device="256MB", host="1.5GiB", disk="/data/kv", disk_limit=10**10))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "device, host or disk must be given"),
        ({"device": 0}, "device .*0"),
        ({"device": -5}, "device .*-5"),
        ({"device": True}, "device .*True"),
        ({"device": 1.5}, "device .*1.5"),
        ({"host": "lots"}, "host .*'lots'"),
        ({"host": "0MB"}, "host .*'0MB'"),
        ({"host": "2 XB"}, "host .*'2 XB'"),
        ({"disk": "x", "disk_limit": "-1GB"}, "disk_limit .*'-1GB'"),
        ({"host": 1, "disk_limit": "1GB"}, "disk_limit needs disk"),
        ({"disk": ""}, "disk .*''"),
        ({"disk": 3}, "disk .*3"),
        ({"disk": "a\0b"}, "disk .*x00"),
        ({"host": 1, "block": 0}, "block must be at least 1, got 0"),
        ({"host": 1, "block": True}, "block must be an integer, got True"),
        ({"host": 1, "prefetch": -1}, "prefetch must be at least 0, got -1"),
        ({"host": 1, "prefetch": 1.0}, "prefetch must be an integer, got 1.0"),
    ],
)
def test_what_is_wrong_is_named(arguments: dict[str, object], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        Offload(**arguments)  # type: ignore[arg-type]
