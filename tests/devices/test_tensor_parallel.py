"""Two processes that share the heads of a model, as transformers' `tp_plan="auto"` splits them, do what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from tensor_parallel_cases import CASES, KV_HEADS, LAYERS, TOGETHER, outcome, whole_model

from kvpress import PolicyCache
from kvpress.errors import UnsupportedModelError
from kvpress.kernels.attention_mass.noise import gumbel, seed_from_head
from kvpress.tensor_parallel import ALONE, HeadShards
from kvpress.testing.tiny_checkpoint import save_tiny_checkpoint

PROCESSES = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found, and what they printed."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    whole_model().save_pretrained(folder / "model")
    save_tiny_checkpoint(folder / "tiny")
    script = Path(__file__).with_name("tensor_parallel_process.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    done = subprocess.run(
        [*command, str(script), str(folder / "model"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return [{**each, "printed": done.stdout} for each in found]


def joined(parts):
    """Positions `[batch][kv_heads][slots]` of all processes' heads; padded to the longest with -1."""
    heads = [[head for part in parts for head in part[row]] for row in range(len(parts[0]))]
    longest = max(len(head) for row in heads for head in row)
    return [[head + [-1] * (longest - len(head)) for head in row] for row in heads]


def same(ranks, expected):
    """Whether the processes' outcomes, taken together, are those of one process."""
    tokens = all(rank[turn] == expected[turn] for rank in ranks for turn in ("first", "second"))
    sets = True
    for field in ("first kept", "second kept", "first selected", "second selected"):
        for layer in range(LAYERS if field in expected else 0):
            parts, wanted = [rank[field][layer] for rank in ranks], expected[field][layer]
            if numpy.ndim(wanted[0]) == 1:  # one set for all heads
                sets &= all(part == wanted for part in parts)
            else:
                sets &= joined(parts) == wanted
    return tokens, sets


@pytest.fixture(scope="module")
def model():
    return whole_model()


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_equal_one(name, ranks, model):
    expected = outcome(model, CASES[name])
    assert expected["heads"] == KV_HEADS and [rank[name]["heads"] for rank in ranks] == [KV_HEADS // PROCESSES] * 2
    assert same([rank[name] for rank in ranks], expected) == (True, True)
    assert all(rank[name].get("first hits") == expected.get("first hits") for rank in ranks)
    if name == "tokenselect":
        assert 0 < sum(expected["second hits"])  # the cosine of the query of all heads was asked, and decided


@pytest.mark.parametrize("name", [*TOGETHER, "random", "keyformer"])
def test_a_decision_of_its_own_in_each_process_is_noticed(name, ranks, model):
    alone = [rank["alone"][name] for rank in ranks]
    _, sets = same(alone, outcome(model, CASES[name]))
    assert not sets


def test_what_cannot_be_shared_out_is_refused(ranks):
    for rank in ranks:
        pairs, per_head = rank["refusals"]
        assert "tokenselect lets all KV heads choose together" in pairs and "h2o does not" in pairs
        assert "budget of tova must be the same for all KV heads under tensor parallelism" in per_head


def test_each_process_saves_and_loads_its_own_heads(ranks):
    for number, rank in enumerate(ranks):
        equal, error = rank["saved"]
        assert equal
        assert f"share [{1 - number}, 2]" in error and f"holds [{number}, 2]" in error


def test_the_example(ranks):
    for number in range(PROCESSES):
        assert f"process {number}: 1 KV heads, " in ranks[0]["printed"]


def test_one_process_alone_is_not_asked(model):
    assert PolicyCache(model, "full").heads is ALONE
    assert ALONE.sum(scores := torch.ones(1, 2, 3)) is scores and ALONE.gather(scores, 0.0) is scores


def test_heads_that_are_not_split_are_refused(model):
    cache = PolicyCache(model, "full")
    cache.heads = HeadShards(0, 2)
    with pytest.raises(UnsupportedModelError, match="split the 4 KV heads of the model into 2 equal parts"):
        model(torch.arange(3, 9)[None], past_key_values=cache)


@pytest.mark.parametrize("seed", [0, 5, 2**62 + 12345, 2**63 - 1, -7])
def test_noise_goes_on_from_a_head(seed):
    heads, rows, keys = torch.arange(6)[:, None, None], torch.arange(4)[:, None], torch.arange(9)
    whole = gumbel(seed, heads, rows, keys)
    for first in (0, 1, 4):
        moved = seed_from_head(seed, first)
        assert -(2**63) <= moved < 2**63
        assert torch.equal(gumbel(moved, heads[: 6 - first], rows, keys), whole[first:])
    assert whole.unique().numel() > 200
