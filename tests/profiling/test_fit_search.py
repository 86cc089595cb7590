"""The longest context that fits, from a configuration alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvpress import PolicyCache
from kvpress.models.errors import ModelLoadError
from kvpress.profiling import configuration
from kvpress.profiling.candidates import STOCK, Candidate, make_candidates, parse_policies
from kvpress.profiling.configuration import load_config
from kvpress.profiling.context import weights_bytes
from kvpress.profiling.fit import (
    LONGEST,
    Room,
    activation_bytes,
    fit,
    kv_bytes,
    largest,
    shortest_context,
    working_bytes,
)
from kvpress.profiling.quantities import parse_list, parse_tokens, written_bytes
from kvpress.profiling.shape import read_shape
from kvpress.testing.families import random_tokens, tiny_config, tiny_model
from kvpress.testing.tiny_checkpoint import save_tiny_checkpoint, save_tiny_gguf

MEGABYTE = 10**6
SHAPE = read_shape(tiny_config("llama"))  # a window of 512 tokens


def wide(shape: object = SHAPE) -> object:
    return type(SHAPE)(**{**vars(SHAPE), "window": None})


@pytest.mark.parametrize("label", ["stock", "full", "snapkv@0.5", "quest@0.25", "adakv@64"])
def test_one_token_more_does_not_fit(label: str) -> None:
    name, _, budget = label.partition("@")
    candidate = make_candidates([name], [budget or "0.5"], stock=False)[0]
    room = Room(memory=6 * MEGABYTE, new_tokens=8)
    shape = wide()
    found = fit(shape, candidate, room)  # type: ignore[arg-type]
    assert found.label == label
    assert (found.bound_by, found.context > 1000) == ("memory", True)
    assert found.total_bytes == found.kv_bytes + found.weights_bytes + found.activation_bytes <= room.memory
    more = found.context + 1
    over = kv_bytes(shape, candidate, more, room) + working_bytes(shape, more, room)  # type: ignore[arg-type]
    assert found.weights_bytes + over > room.memory


def test_the_context_found_is_the_one_that_a_model_holds() -> None:
    """Run what was found: the cache weighs what was said, a token more would be too much for the room."""
    model = tiny_model()
    room = Room(memory=weights_bytes(model) + 40_000, new_tokens=5, activations=1)
    candidate = Candidate("snapkv", 0.5, {"window": 8})
    found = fit(SHAPE, candidate, room)
    policy = candidate.policy(found.context)
    assert policy is not None and 100 < found.context < 500
    cache = PolicyCache(model, policy)
    ids = random_tokens(1, found.context)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    assert 0 <= cache.nbytes - found.kv_bytes <= 16 * 2 * 2  # without native kernels 16 bytes a KV head are noted
    assert found.weights_bytes == weights_bytes(model)
    assert room.memory - 300 < found.total_bytes <= room.memory


def test_the_window_bounds_what_does_not_reindex() -> None:
    room = Room(memory=10**9, new_tokens=12)
    found = fit(SHAPE, Candidate("streaming_llm", 64), room)
    assert (found.context, found.bound_by) == (500, "window")
    endless = fit(SHAPE, Candidate("streaming_llm", 64, {"positions": "reindex"}), Room(10**9, chunk_size=128))
    assert (endless.context, endless.bound_by) == (LONGEST, "search")


def test_nothing_fits_beside_the_weights() -> None:
    found = fit(SHAPE, Candidate("full"), Room(memory=SHAPE.weights_bytes))
    assert (found.context, found.bound_by) == (0, "memory")
    assert found.total_bytes > SHAPE.weights_bytes


def test_what_takes_room() -> None:
    shape, memory = replace(SHAPE, window=1 << 20), 4_000_000
    base = fit(shape, Candidate(STOCK), Room(memory=memory, new_tokens=1))
    smaller = {
        "more rows": Room(memory=memory, new_tokens=1, batch=2),
        "more new tokens": Room(memory=memory, new_tokens=100),
        "heavier weights": Room(memory=memory, new_tokens=1, weights=SHAPE.weights_bytes + 50_000),
        "more activations": Room(memory=memory, new_tokens=1, activations=3_800_000),
    }
    assert base.bound_by == "memory" and base.context > 768
    for reason, room in smaller.items():
        assert fit(shape, Candidate(STOCK), room).context < base.context, reason
    assert fit(shape, Candidate(STOCK), Room(memory=memory, new_tokens=1, chunk_size=16)).context > base.context


def test_the_allowance_is_what_is_documented() -> None:
    hidden, intermediate, queries, keys_and_values = 32, 48, 32, 2 * 16
    numbers = 4 * hidden + 3 * intermediate + 2 * queries + 2 * keys_and_values
    assert activation_bytes(SHAPE, 1000) == 1.75 * (1000 * numbers + 2 * 97) * 4
    assert activation_bytes(SHAPE, 10) == activation_bytes(SHAPE, 768) < activation_bytes(SHAPE, 769)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 1000])
@pytest.mark.parametrize("least", [1, 4])
def test_the_search_finds_every_limit(limit: int, least: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= limit

    assert largest(fits, least, 900) == (min(limit, 900) if limit >= least else 0)
    assert len(asked) < 30
    assert all(least <= number <= 900 for number in asked)


def test_a_share_too_small_for_a_short_prompt_starts_where_it_is_taken() -> None:
    assert shortest_context(Candidate("quest", 0.25)) == 64
    assert shortest_context(Candidate("tova", 0.25)) == 1
    with pytest.raises(ValueError, match="top_k"):
        shortest_context(Candidate("quest", 8))


def test_candidates_as_they_are_typed() -> None:
    assert parse_policies(["snapkv:window=64,pooling=avg,tova", "full"]) == [
        ("snapkv", {"window": 64, "pooling": "avg"}),
        ("tova", {}),
        ("full", {}),
    ]
    found = make_candidates(
        ["snapkv:window=16,full,sepllm", "quest,snapkv:window=16"], ["64,0.5", "1MB"][:1], stock=True
    )
    labels = ["stock", "snapkv@64[window=16]", "snapkv@0.5[window=16]", "full", "sepllm", "quest@64", "quest@0.5"]
    assert [candidate.label for candidate in found] == labels
    assert found[-1].policy(1000).top_k == 500  # type: ignore[union-attr]
    assert found[1].policy(1000).budget == 64  # type: ignore[union-attr]
    assert found[0].policy(1000) is None
    own = make_candidates(["quest:top_k=32", "stock"], ["0.5"], stock=False)
    assert [candidate.label for candidate in own] == ["quest[top_k=32]", "stock"]
    stored = make_candidates(["tova:kv_dtype=int8"], ["0.5"], stock=False)
    assert [(each.label, each.kv_dtype, each.options) for each in stored] == [("tova@0.5[kv_dtype=int8]", "int8", {})]


@pytest.mark.parametrize(
    ("policies", "budgets", "message"),
    [
        (["snapkw"], ["0.25"], "did you mean 'snapkv'"),
        (["tova:kv_dtype=int3"], ["0.25"], "kv_dtype must be .* got 'int3'"),
        (["window=3"], ["0.25"], "name:parameter=value"),
        (["snapkv:window"], ["0.25"], "name=value"),
        (["tova,,full"], ["0.25"], "separated by commas"),
        ([], ["0.25"], "at least one policy"),
        (["tova"], ["0"], "budget"),
        (["tova"], ["12 parsecs"], "12 parsecs"),
        (["quest"], ["1MB"], "attends to a part"),
        (["snapkv:windows=9"], ["64"], "windows"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(policies: list[str], budgets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_candidates(policies, budgets, stock=False)


def test_quantities() -> None:
    assert parse_list("16k,1k,1024, 100", "contexts") == [100, 1024, 16384]
    assert parse_tokens("1m", "contexts") == 2**20
    for wrong in ("", "1q", "-4", "0", "1.5k"):
        with pytest.raises(ValueError, match="contexts must be a number of tokens"):
            parse_tokens(wrong, "contexts")
    assert [written_bytes(count) for count in (12, 1234, 5_000_000, 2.5e9)] == ["12 B", "1.23 kB", "5 MB", "2.5 GB"]


def test_the_configuration_of_a_packaged_model_and_of_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    save_tiny_checkpoint(tmp_path / "folder")
    monkeypatch.setattr(configuration, "packaged_folder", lambda model: tmp_path / "folder")
    packaged = load_config("smollm2")
    read = load_config(save_tiny_gguf(tmp_path / "tiny.gguf"))
    for field in ("num_hidden_layers", "num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_size"):
        assert getattr(packaged, field) == getattr(read, field)
    with pytest.raises(ModelLoadError, match="no such file"):
        load_config(tmp_path / "none.gguf")
