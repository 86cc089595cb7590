"""Nothing that is read from disk goes through pickle, marshal or exec."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kvpress.offload import BlockKey, Offload, TierCorruptError, TierManager

FORBIDDEN = {"pickle.find_class", "marshal.loads", "marshal.load", "exec", "compile", "subprocess.Popen", "os.system"}


def guarded(work: Callable[[], object]) -> str:
    """Run `work` with an audit hook that cannot be taken off again, so only in a child."""
    seen: list[str] = []
    sys.addaudithook(lambda event, arguments: seen.append(event) if event in FORBIDDEN else None)
    result = work()
    return f"{result} {seen}"


def round_trip(folder: Path, tensors: dict[str, Tensor]) -> str:
    with TierManager(Offload(host=10_000, disk=folder)) as manager:
        good, bad = BlockKey("cache", 0, 0), BlockKey("cache", 0, 1)
        for key in (good, bad):
            manager.put(key, tensors, "cache")
            manager.evict(key)
        (path,) = folder.glob(f"*/{bad.digest}")
        path.write_bytes(pickle.dumps(Evil()))
        found = manager.get(good)
        right = found is not None and all(torch.equal(found[n], t) for n, t in tensors.items())
        try:
            manager.get(bad)
        except TierCorruptError:
            return f"exact {right}, pickle refused"
    return "the pickle was taken"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1/0",)


def test_reading_never_unpickles(tmp_path: Path, in_child: Callable[..., tuple[int, str]]) -> None:
    tensors = {"key": torch.arange(10.0)}
    round_trip(tmp_path, tensors)  # imports are done before the hook is set
    assert in_child(lambda: guarded(lambda: round_trip(tmp_path, tensors))) == (0, "exact True, pickle refused []")


def test_the_hook_would_see_a_pickle(in_child: Callable[..., tuple[int, str]]) -> None:
    assert "pickle.find_class" in in_child(lambda: guarded(lambda: pickle.loads(pickle.dumps(Path()))))[1]  # noqa: S301


def test_the_sources_name_no_unsafe_reader() -> None:
    import kvpress.offload as package

    sources = sorted(Path(package.__file__).parent.glob("*.py"))
    assert len(sources) > 10
    for source in sources:
        text = source.read_text()
        for word in ("import pickle", "torch.load", "torch.save", "marshal", "shelve", "eval(", "exec("):
            assert word not in text, f"{source.name} uses {word}"
