"""Copies between device and host wait for what they must, on a device that runs all work as late or early as it can."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvpress.offload import BlockKey, Offload, TierManager
from kvpress.offload.transfer import Transfer
from kvpress.testing.fake_device import POISON, FakeDevice

EAGER = (None, "compute", "side")
SIZE = 64


def filled(value: int) -> Tensor:
    return torch.full((SIZE,), value, dtype=torch.uint8)


def store_then_free(device: FakeDevice, transfer: Transfer) -> bool:
    """A kernel writes a block, the block is stored, its memory is given back, and the host reads the copy."""
    source, target = device.empty(SIZE), device.empty_host(SIZE)
    device.launch(lambda: source.fill_(7))
    transfer.store(source, target)
    transfer.free(source)
    seen = target.clone()
    device.synchronize()
    return torch.equal(seen, filled(7)) and torch.equal(target, filled(7))


def load_then_compute(device: FakeDevice, transfer: Transfer) -> bool:
    """A block is loaded, its host copy is given back, a kernel reads it, and its memory is given back."""
    source, target = device.empty_host(SIZE).fill_(9), device.empty(SIZE)
    seen = torch.zeros(SIZE, dtype=torch.uint8)
    transfer.load(source, target)
    transfer.free_host(source)
    transfer.join(target)
    device.launch(lambda: seen.copy_(target))
    transfer.free(target)
    device.synchronize()
    return torch.equal(seen, filled(9))


def load_over_memory_in_use(device: FakeDevice, transfer: Transfer) -> bool:
    """The allocator hands out memory that a queued kernel still reads, as a caching allocator does."""
    memory, seen, after = device.empty(SIZE), torch.zeros(SIZE, dtype=torch.uint8), torch.zeros(SIZE, dtype=torch.uint8)
    device.launch(lambda: memory.fill_(1))
    device.launch(lambda: seen.copy_(memory))
    source = device.empty_host(SIZE).fill_(2)
    transfer.load(source, memory)
    transfer.join(memory)
    device.launch(lambda: after.copy_(memory))
    device.synchronize()
    return torch.equal(seen, filled(1)) and torch.equal(after, filled(2))


def load_then_free_unread(device: FakeDevice, transfer: Transfer) -> bool:
    """A loaded block is given up unread; the next kernel gets its memory and must not be overwritten by the copy."""
    source, target = device.empty_host(SIZE).fill_(9), device.empty(SIZE)
    seen = torch.zeros(SIZE, dtype=torch.uint8)
    transfer.load(source, target)
    transfer.free(target)
    device.launch(lambda: target.fill_(4))
    device.launch(lambda: seen.copy_(target))
    device.synchronize()
    return torch.equal(seen, filled(4)) and torch.equal(target, filled(4))


SCENES: list[Callable[[FakeDevice, Transfer], bool]] = [
    store_then_free, load_then_compute, load_over_memory_in_use, load_then_free_unread,
]  # fmt: skip


@pytest.mark.parametrize("eager", EAGER)
@pytest.mark.parametrize("scene", SCENES)
def test_the_right_bytes_arrive(scene: Callable[[FakeDevice, Transfer], bool], eager: str | None) -> None:
    device = FakeDevice(eager)
    assert scene(device, Transfer(device))
    assert device.delayed > 0


def without(name: str) -> type[Transfer]:
    return type("Sabotaged", (Transfer,), {name: lambda self, event=None: None})


@pytest.mark.parametrize(
    "wait", ["_source_is_written", "_store_is_done", "_target_is_unused", "_load_is_joined", "_load_is_done"]
)
def test_every_single_wait_is_needed(wait: str) -> None:
    outcomes = []
    for eager in EAGER:
        for scene in SCENES:
            device = FakeDevice(eager)
            outcomes.append(scene(device, without(wait)(device)))
    assert not all(outcomes)
    assert any(outcomes)  # the other waits still hold


def work_through(
    device: FakeDevice, transfer: Transfer, tensors_of: Callable[..., dict[str, Tensor]], disk: object
) -> int:
    """Blocks go down and up through all tiers, read by kernels only; returns how many were read wrong."""
    wrong = 0
    sources = {BlockKey("cache", 0, index): tensors_of(index) for index in range(12)}
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    with TierManager(Offload(device=2048, host=3 * 512, disk=disk), device=device, transfer=transfer) as manager:
        for key, tensors in sources.items():
            on_device = {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}
            with torch.no_grad():
                for name, tensor in tensors.items():
                    on_device[name].copy_(tensor)
            manager.put(key, on_device, "cache")
        for _ in range(2):
            for key, tensors in sources.items():
                with manager.use([key]) as (found,):
                    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
                    for name, tensor in found.items():
                        device.launch(lambda target=copies[name], source=tensor: target.copy_(source))
                seen.append((copies, tensors))
        statistics = manager.statistics()
    device.synchronize()
    for copies, tensors in seen:
        wrong += not all(torch.equal(copies[n].view(torch.uint8), t.view(torch.uint8)) for n, t in tensors.items())
    assert statistics["device"].bytes_in > 0 and statistics["host"].bytes_in > 0
    assert statistics["disk"].bytes_in > 0 and statistics["disk"].bytes_out > 0
    for name in ("device", "host"):
        assert statistics[name].peak_bytes <= (statistics[name].limit or 0)
    assert device.poisoned > 0
    return wrong


@pytest.mark.parametrize("eager", EAGER)
def test_a_manager_on_such_a_device_reads_every_block_right(
    eager: str | None, tensors_of: Callable[..., dict[str, Tensor]], tmp_path: object
) -> None:
    device = FakeDevice(eager)
    assert work_through(device, Transfer(device), tensors_of, tmp_path) == 0


@pytest.mark.parametrize("wait", ["_store_is_done", "_load_is_joined", "_load_is_done"])
def test_a_manager_without_a_wait_reads_blocks_wrong(
    wait: str, tensors_of: Callable[..., dict[str, Tensor]], tmp_path: object
) -> None:
    wrong = 0
    for eager in EAGER:
        device = FakeDevice(eager)
        wrong += work_through(device, without(wait)(device), tensors_of, tmp_path)
    assert wrong > 0


def test_freed_memory_is_not_a_number() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.full((8,), POISON, dtype=torch.uint8).view(dtype).isnan().all()


def test_rounding_of_pinned_memory_counts(tensors_of: Callable[..., dict[str, Tensor]]) -> None:
    tensors = tensors_of(1)
    nbytes = sum(t.nbytes for t in tensors.values())
    assert 128 < nbytes < 256
    with TierManager(Offload(host=1000), device=FakeDevice()) as manager:
        for index in range(3):
            manager.put(BlockKey("cache", 0, index), tensors, "cache")
        assert manager.statistics()["host"].bytes == 3 * 256
