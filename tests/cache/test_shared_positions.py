"""KV heads that hold the same tokens share one buffer of positions; an eviction that tells them apart gives each its own."""

import copy

import numpy
import pytest
import torch

from kvpress import PolicyCache
from kvpress.kernels.eviction import RowWriter
from kvpress.memory import held_bytes
from kvpress.slots import POSITION, SlotTable
from kvpress.testing.families import random_tokens, tiny_model

BATCH, HEADS, DIM = 2, 3, 4


def growing(tokens: int = 6, pad: int = 0) -> SlotTable:
    table = SlotTable(("score",))
    keys = torch.randn(BATCH, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.arange(tokens, dtype=torch.int32) - left for left in (0, pad)])
    table.place(table.append(keys, -keys), positions.clamp(min=-1), (tokens, tokens - pad))
    table.settle()
    return table


def is_shared(table: SlotTable) -> bool:
    """From the bytes behind the column, which must be those of one head or of all."""
    positions = table.columns[POSITION]
    batch, kv_heads, capacity = positions.shape
    held = held_bytes([positions])
    assert kv_heads > 1 and held in (4 * batch * capacity, 4 * batch * capacity * kv_heads)
    return held == 4 * batch * capacity


def all_shared(cache: PolicyCache) -> bool:
    shared = {is_shared(layer.table) for layer in cache.policy_layers}
    assert len(shared) == 1
    return shared.pop()


def reads(model, cache, tokens: int, seed: int = 1, batch: int = 1, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(batch, tokens, seed=seed), past_key_values=cache, **inputs).logits


def test_a_growing_table_shares_positions_and_grows_so():
    table = growing()
    assert is_shared(table) and table.positions.shape == (BATCH, HEADS, 6)
    first = table.columns[POSITION]
    for position in range(6, 30):
        token = torch.randn(BATCH, HEADS, 1, DIM)
        new = table.append(token, token)
        table.place(new, torch.tensor([[position]], dtype=torch.int32), (1, 1))
    assert (
        table.columns[POSITION] is not first and table.prepared is not None
    )  # it has moved, and is written by prepared calls
    assert is_shared(table) and table.positions.tolist() == [[list(range(30))] * HEADS] * BATCH


@pytest.mark.parametrize("ragged", [False, True])
def test_heads_have_positions_of_their_own_once_they_keep_other_tokens(ragged):
    table = growing()
    index = torch.tensor([[[0, 1], [2, 3], [4, 5]]]).expand(BATCH, HEADS, 2).contiguous()
    counts = numpy.full((BATCH, HEADS), 2)
    if ragged:
        table.keep_ragged(index, counts, counts + numpy.array([[1, 2, 1]] * BATCH))
    else:
        table.keep(index, counts, 1)
    assert not is_shared(table) and table.kept_positions().tolist() == [[[0, 1], [2, 3], [4, 5]]] * BATCH
    slot = torch.tensor([[[2], [2], [2]]]).expand(BATCH, HEADS, 1).contiguous()
    token = torch.ones(BATCH, HEADS, 1, DIM)
    table.place(table.append(token, token), torch.tensor([[6]], dtype=torch.int32), (1, 1))
    assert table.positions.gather(-1, slot).tolist() == [[[6]] * HEADS] * BATCH


def test_a_tensor_that_stands_for_all_heads_is_not_written():
    positions = growing().columns[POSITION]
    with pytest.raises(RuntimeError, match="single memory location"):
        positions[:, :, 0] = 7
    with pytest.raises(ValueError, match="columns must be contiguous"):
        RowWriter([positions], (BATCH, HEADS))


def test_padding_rows_and_taken_back_tokens():
    table = growing(pad=2)
    assert is_shared(table) and table.positions[1].tolist() == [[-1, -1, 0, 1, 2, 3]] * HEADS
    table.drop_last(5)
    assert table.held.tolist() == [[1] * HEADS, [0] * HEADS]
    table.select_batch(torch.tensor([1, 0, 1]))
    assert is_shared(table) and table.positions[:, :, 0].tolist() == [[-1] * HEADS, [0] * HEADS, [-1] * HEADS]


def test_a_copy_shares_among_its_heads_and_with_nobody_else():
    table = growing()
    other = copy.deepcopy(table)
    assert is_shared(other)
    other.columns.stored(POSITION).fill_(9)
    assert (other.positions == 9).all() and table.positions.tolist() == [[list(range(6))] * HEADS] * BATCH


@pytest.mark.parametrize("heads", [1, HEADS])
def test_a_loaded_table_shares_what_its_heads_agree_on(heads):
    state = growing().state()
    positions = state["columns"][POSITION][:, :heads].clone(memory_format=torch.contiguous_format)
    table = SlotTable(("score",))
    table.load_state(state | {"columns": state["columns"] | {POSITION: positions}})
    assert is_shared(table) and table.positions.tolist() == [[list(range(6))] * HEADS] * BATCH
    table.load_state(growing().state())
    assert is_shared(table)
    if heads > 1:  # one number of one head
        positions[0, -1, 0] = -1
        table.load_state(state | {"columns": state["columns"] | {POSITION: positions}})
        assert not is_shared(table) and table.positions[0, -1, 0] == -1 and table.positions[0, 0, 0] == 0


def test_a_loaded_steady_table_has_a_slot_for_each_head():
    """Heads that agree by chance do not evict alike."""
    table = growing()
    table.keep(torch.tensor([1, 2]).expand(BATCH, HEADS, 2).contiguous(), numpy.full((BATCH, HEADS), 2), 1)
    made = SlotTable(("score",))
    made.load_state(table.state())
    assert not is_shared(made) and made.kept_positions().tolist() == [[[1, 2]] * HEADS] * BATCH


@pytest.mark.parametrize("policy", ["full", "tokenselect", "quest", "snapkv"])
def test_a_cache_over_several_turns(policy, tmp_path):
    """Nothing is evicted: positions are stored once through turns, decoded tokens, copies and files."""
    model = tiny_model()
    parameters = {"budget": 300} if policy == "snapkv" else {}
    cache = PolicyCache(model, policy, **parameters)
    for turn, tokens in enumerate((20, 1, 1, 7, 1)):
        reads(model, cache, tokens, seed=turn)
        assert all_shared(cache)
    cache.save(tmp_path / "cache")
    copied, loaded = copy.deepcopy(cache), PolicyCache.load(tmp_path / "cache", model)
    assert all_shared(copied) and all_shared(loaded) and loaded.nbytes <= cache.nbytes
    wanted, *found = (reads(model, each, 3) for each in (cache, copied, loaded))
    assert all(torch.equal(logits, wanted) for logits in found) and wanted.std() > 0.1


def test_tokens_taken_back_and_rows_chosen():
    model = tiny_model()
    cache = PolicyCache(model, "full")
    reads(model, cache, 20, batch=2)
    cache.crop(-5)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert all_shared(cache) and cache.kept_positions(0).tolist() == [[list(range(15))] * 2] * 2


@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_an_eviction_ends_it(policy):
    model = tiny_model()
    cache = PolicyCache(model, policy, budget=40)
    reads(model, cache, 40)
    assert all_shared(cache)
    reads(model, cache, 4)
    assert not all_shared(cache)
    assert any(
        cache.kept_positions(layer)[0, 0].tolist() != cache.kept_positions(layer)[0, 1].tolist() for layer in range(2)
    )
