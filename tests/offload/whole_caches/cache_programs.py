"""Random programs for whole caches: a policy, where its tables lie, and what is done to it. Plain data: printed, it can be run again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from kvpress.policies import (
    H2O,
    TOVA,
    AdaKV,
    Full,
    Keyformer,
    KNorm,
    MorphKV,
    PyramidKV,
    Quest,
    SepLLM,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    TokenSelect,
)

ENDLESS = 10_000  # tokens: more than any program has
MOST_ROWS = 4
BYTES_PER_TOKEN = 1024  # of one row in fp32: keys and values of four layers with two KV heads of 16 numbers
SEPARATORS = tuple(range(5, 97, 6))


@dataclass(frozen=True)
class Setting:
    """What a cache is made with.

    Attributes:
        policy: one or a list.
        whole: all is kept and attended to, so that it must equal a full cache.
        host: bytes of the host tier, or None.
        pads: padding tokens at the left of each batch row.
    """

    policy: Any
    whole: bool
    kv_dtype: str | None
    host: int | None
    disk: bool
    block: int
    prefetch: int
    pads: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """Something that is done to one of the caches.

    Attributes:
        name: of a method of `Lanes`.
        amount: its argument: lengths of the forwards, tokens to take back, or a number from which rows are drawn.
        lane: which of the copies, modulo their number.
        inference: under `torch.inference_mode()`, else under `torch.no_grad()`.
        threads: of torch.
    """

    name: str
    amount: tuple[int, ...] = ()
    lane: int = 0
    inference: bool = False
    threads: int = 1


@dataclass(frozen=True)
class Program:
    setting: Setting
    operations: tuple[Operation, ...]


def vote(random: Random, whole: bool, index: str) -> TokenSelect:
    chunk = random.choice([8, 16])
    return TokenSelect(
        top_k=ENDLESS if whole else random.choice([4, 12, 24]),
        sinks=random.choice([0, 2]),
        local=chunk + random.choice([0, 4]),
        chunk=chunk,
        tail=random.choice([0, 2]),
        threshold=random.choice([0.0, 0.5, 0.9, 2.0]),
        positions=random.choice(["keep", "reindex"]),
        group=random.choice(["floor", "floor", "mod"]),
        index=index,
    )


def budget(random: Random, whole: bool) -> int:
    return ENDLESS if whole else random.choice([24, 40, 60])


POLICIES: dict[str, Callable[[Random, bool], Any]] = {
    "full": lambda random, whole: Full(),
    "tokenselect": lambda random, whole: vote(random, whole, "exact"),
    "tokenselect int8": lambda random, whole: vote(random, whole, "int8"),
    "tokenselect int4": lambda random, whole: vote(random, whole, "int4"),
    "quest": lambda random, whole: Quest(
        top_k=ENDLESS if whole else random.choice([16, 32]),
        page_size=random.choice([4, 16]),
        skip_layers=random.choice([0, 1]),
    ),
    "tidaldecode": lambda random, whole: TidalDecode(
        top_k=ENDLESS if whole else random.choice([8, 24]), dense_layers=random.choice([0, 1])
    ),
    "streaming_llm": lambda random, whole: StreamingLLM(
        budget=budget(random, whole),
        sinks=2,
        interval=random.choice([1, 5]),
        positions=random.choice(["keep", "reindex"]),
    ),
    "snapkv": lambda random, whole: SnapKV(budget=budget(random, whole), window=8, interval=random.choice([1, 1, 6])),
    "adakv": lambda random, whole: AdaKV(budget=budget(random, whole), window=8),
    "pyramidkv": lambda random, whole: PyramidKV(budget=budget(random, whole), window=8, beta=4),
    "h2o": lambda random, whole: H2O(budget=budget(random, whole), interval=random.choice([1, 4])),
    "keyformer": lambda random, whole: Keyformer(budget=budget(random, whole), steps=20),
    "tova": lambda random, whole: TOVA(budget=budget(random, whole)),
    "morphkv": lambda random, whole: MorphKV(budget=budget(random, whole), window=8),
    "sepllm": lambda random, whole: SepLLM(
        initial=2, separators=8, window=20, capacity=ENDLESS if whole else 60, token_ids=SEPARATORS
    ),
    "knorm and tokenselect": lambda random, whole: [
        KNorm(budget=ENDLESS if whole else 90),
        vote(random, whole, random.choice(["exact", "int8", "int4"])),
    ],
}


def drawn_program(name: str, seed: int) -> Program:
    """A program for one of `POLICIES`, the same for the same `seed`."""
    random = Random(f"{name} {seed}")
    whole = seed % 3 == 1
    rows, prompt = random.choice([1, 1, 1, 2, 3]), random.randint(30, 200)
    pads = [random.choice([0, random.randint(0, prompt // 2)]) for _ in range(rows)]
    size = BYTES_PER_TOKEN * rows * prompt
    where = random.choice(["disk", "disk", "host and disk", "host and disk", "host"])
    setting = Setting(
        policy=POLICIES[name](random, whole),
        whole=whole,
        kv_dtype=random.choice([None, None, "bfloat16", "int8"]),
        host=None
        if where == "disk"
        else int(size * (random.uniform(0.5, 4) if where == "host" else random.uniform(0.3, 2))),
        disk=where != "host",
        block=random.choice([4, 16, 64]),
        prefetch=random.choice([0, 1, 2]),
        pads=tuple(pads) if random.random() < 0.6 else (0,) * rows,
    )
    operations = [
        Operation("forward", cut(random, prompt)),
        *(an_operation(random) for _ in range(random.randint(5, 12))),
    ]
    return Program(setting, tuple(with_mode(random, each) for each in operations))


def an_operation(random: Random) -> Operation:
    name = random.choices(
        ["decode", "turn", "crop", "beams", "select", "fork", "save", "reset", "record"],
        [6, 4, 3, 2, 1, 2, 1, 0.5, 0.3],
    )[0]
    number = random.randrange(1 << 16)
    match name:
        case "decode":
            return Operation("forward", (1,) * random.randint(1, 20))
        case "turn":
            return Operation("forward", cut(random, random.randint(2, 50)))
        case "crop":
            return Operation("crop", (random.choice([0, 1, random.randint(2, 20), random.randint(10, 150), ENDLESS]),))
        case "beams":
            return Operation("beams", (random.randint(1, 6), number))
    return Operation(name, (number,))


def with_mode(random: Random, operation: Operation) -> Operation:
    mode = {
        "lane": random.randrange(6),
        "inference": random.random() < 0.5,
        "threads": 2 if random.random() < 0.08 else 1,
    }
    return replace(operation, **mode)


def cut(random: Random, tokens: int) -> tuple[int, ...]:
    """Lengths of pieces of `tokens` tokens, often one."""
    if random.random() < 0.5:
        return (tokens,)
    sizes, most = [], random.choice([3, 17, 80])
    while tokens:
        sizes.append(min(random.randint(max(1, most // 3), most), tokens))
        tokens -= sizes[-1]
    return tuple(sizes)


def shortened(program: Program, fails: Callable[[Program], bool], most: int = 200) -> Program:
    """The program without the operations, and the forwards, that its failure does not need, as far as `most` tries show."""
    tries, shorter = 0, iter(_shorter(program))
    while tries < most and (candidate := next(shorter, None)) is not None:
        tries += 1
        if fails(candidate):
            program, shorter = candidate, iter(_shorter(candidate))
    return program


def _shorter(program: Program) -> list[Program]:
    operations = program.operations
    found = [operations[:place] for place in range(1, len(operations))]
    found += [operations[:place] + operations[place + 1 :] for place in reversed(range(1, len(operations)))]
    for place, each in enumerate(operations):
        found += [(*operations[:place], other, *operations[place + 1 :]) for other in _simpler(each)]
    return [replace(program, operations=each) for each in found]


def _simpler(operation: Operation) -> list[Operation]:
    found, lengths = [], operation.amount
    if operation.name == "forward" and len(lengths) > 1:
        shorter = {(sum(lengths),), lengths[: len(lengths) // 2], lengths[1:]} - {lengths}
        found += [replace(operation, amount=amount) for amount in sorted(shorter)]
    plain = Operation(operation.name, lengths)
    for field in ("lane", "inference", "threads"):
        if getattr(operation, field) != getattr(plain, field):
            found.append(replace(operation, **{field: getattr(plain, field)}))
    return found
