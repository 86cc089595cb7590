"""Random programs over whole caches: with offload as without it, bit for bit, and as a full cache where all is kept and attended to.

A failure prints a short program that still fails: `run_program(Program(…), folder, Counter())` runs it. `KVPRESS_TEST_EVERYTHING=1` runs a
hundred programs for each policy, and `KVPRESS_TEST_SEED` (0) says which.
"""

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from cache_lanes import run_program
from cache_programs import POLICIES, Program, drawn_program, shortened

FIRST = int(os.environ.get("KVPRESS_TEST_SEED", "0"))
EVERYTHING = os.environ.get("KVPRESS_TEST_EVERYTHING") == "1"

BLOCKS = {"disk bytes_in", "disk bytes_out", "crops", "forks", "rows selected"}
NEAR = {"near copies found", "near copies made", "near copies given up", "tails among near copies"}
GROWING = {  # what must happen with policies whose tables grow, so that they are cut into blocks, and how many programs it takes
    "full": (8, BLOCKS | {"saves", "forwards compared with a full cache"}),
    "tokenselect": (8, BLOCKS | {"selections"}),
    "tokenselect int8": (14, BLOCKS | NEAR | {"blocks cut", "layers read ahead", "selections", "selections reused"}),
    "tokenselect int4": (8, BLOCKS | NEAR | {"selections", "selections reused"}),
    "quest": (8, BLOCKS | NEAR | {"selections"}),
    "tidaldecode": (8, BLOCKS | {"selections", "selections reused"}),
}


def run_one(program: Program, happened: Counter[str]) -> None:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        run_program(program, Path(name), happened)


def fails(program: Program) -> bool:
    try:
        run_one(program, Counter())
    except Exception:
        return True
    return False


@pytest.mark.parametrize("name", POLICIES)
def test_programs(name):
    happened: Counter[str] = Counter()
    several, must = GROWING.get(name, (4, {"evictions"}))
    for seed in range(FIRST, FIRST + (100 if EVERYTHING else several)):
        program = drawn_program(name, seed)
        try:
            run_one(program, happened)
        except Exception as error:
            short = shortened(program, fails)
            raise AssertionError(f"{name}, seed {seed}: {type(error).__name__}: {error}\n{short}") from error
    assert happened["forwards"] >= 30 and must <= {what for what, often in happened.items() if often}, happened
