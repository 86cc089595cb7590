"""Which way a slot table writes: by prepared calls where its buffers stay where they are, by plain ones elsewhere; both write the same."""

from types import SimpleNamespace

import numpy
import pytest
import torch

from kvpress.prepared import PreparedSlots
from kvpress.slots import SlotTable

BATCH, HEADS, DIM = 2, 3, 4


def rows(tokens: int, start: float = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[batch, kv_heads, tokens, dim]` in which every number is another."""
    return start + torch.arange(BATCH * HEADS * tokens * DIM, dtype=dtype).view(BATCH, HEADS, tokens, DIM)


def positions(first: int, tokens: int = 1) -> torch.Tensor:
    return torch.arange(first, first + tokens, dtype=torch.int32)[None]


def add(table: SlotTable, tokens: int = 1, start: float = 100, dtype: torch.dtype = torch.float32) -> slice:
    """Append tokens and place them behind those that are there."""
    first = table.count
    new = table.append(rows(tokens, start, dtype), -rows(tokens, start, dtype))
    table.place(new, positions(first, tokens), (tokens, tokens))
    return new


def growing(tokens: int = 6) -> SlotTable:
    table = SlotTable(("score",))
    add(table, tokens, start=0)
    table.settle()
    return table


def steady() -> SlotTable:
    table = growing(6)
    table.keep(torch.arange(2, 6).expand(BATCH, HEADS, 4).contiguous(), numpy.full((BATCH, HEADS), 4), 1)
    return table


def stowed(table: SlotTable) -> SlotTable:
    """With a stowage that has nothing to bring."""
    table.stowage = SimpleNamespace(fetch=lambda *_: None)
    return table


@pytest.fixture
def calls(monkeypatch):
    """Names of the prepared calls made, in their order."""
    made = []

    def counted(name):
        original = getattr(PreparedSlots, name)

        def call(self, *arguments):
            made.append(name)
            return original(self, *arguments)

        return call

    for name in ("overwrite", "place", "write_keys"):
        monkeypatch.setattr(PreparedSlots, name, counted(name))
    return made


def test_prepared_calls_are_made_once_for_buffers_that_stay():
    table = SlotTable(("score",))
    add(table, 6, start=0)
    assert table.prepared is None, "the model's own tensors"
    table.settle()
    assert table.prepared is not None and table.prepared is table.prepared
    moved = stowed(growing())
    assert moved.prepared is None, "they may lie elsewhere at the next token"
    with pytest.raises(RuntimeError, match="this table is not steady"):
        _ = moved.steady
    stays = stowed(steady())
    assert stays.prepared is not None and stays.prepared is stays.steady is stays.prepared
    before = steady()
    first = before.prepared
    before.stowage = stowed(growing()).stowage
    assert before.prepared is first, "what is prepared stays so while the buffers do"


def test_a_decoded_token_is_written_by_prepared_calls(calls):
    table = growing()
    new = add(table)
    table.write_keys(new, rows(1, start=500))
    assert calls == ["overwrite", "place", "write_keys"]
    assert torch.equal(table.stored()[0][:, :, 6:], rows(1, start=500))
    assert torch.equal(table.stored()[1][:, :, 6:], -rows(1, start=100))
    assert torch.equal(table.stored()[0][:, :, :6], rows(6)) and (table.positions[:, :, 6] == 6).all()


@pytest.mark.parametrize("tokens", [2, 3])
def test_several_tokens_are_written_as_tensors(calls, tokens):
    table = growing()
    assert table.prepared is not None
    new = add(table, tokens)
    table.write_keys(new, rows(tokens, start=500))
    assert calls == []
    assert torch.equal(table.stored()[0][:, :, 6:], rows(tokens, start=500))
    assert torch.equal(table.stored()[1][:, :, 6:], -rows(tokens, start=100))
    assert table.positions[0, 0].tolist() == list(range(6 + tokens))


def test_a_token_after_several_is_written_by_prepared_calls(calls):
    table = growing()
    add(table, 2)
    table.write_keys(add(table, start=300), rows(1, start=500))
    assert calls == ["overwrite", "place", "write_keys"]
    assert torch.equal(table.stored()[0][:, :, 6:8], rows(2, start=100))
    assert torch.equal(table.stored()[0][:, :, 8:], rows(1, start=500))
    assert table.positions[0, 0].tolist() == list(range(9))


def test_a_token_where_nothing_is_prepared_is_written_as_a_tensor(calls):
    table = stowed(growing())
    new = add(table)
    table.write_keys(new, rows(1, start=500))
    assert calls == [] and table.prepared is None
    assert torch.equal(table.stored()[0][:, :, 6:], rows(1, start=500))
    assert torch.equal(table.stored()[1][:, :, 6:], -rows(1, start=100)) and (table.positions[:, :, 6] == 6).all()
    first = SlotTable(("score",))
    first.write_keys(add(first, 1, start=0), rows(1, start=500))
    assert calls == [] and torch.equal(first.keys, rows(1, start=500)), "one token is a prompt too"


def test_a_token_of_another_type_is_written_as_a_tensor(calls):
    table = growing()
    add(table, dtype=torch.float64)
    assert "overwrite" not in calls
    assert torch.equal(table.stored()[0][:, :, 6:], rows(1, start=100))
    add(table, start=300)
    assert "overwrite" in calls
    assert torch.equal(table.stored()[0][:, :, 7:], rows(1, start=300))


def test_a_token_of_a_steady_table_is_written_by_prepared_calls(calls):
    table = steady()
    new = table.append(rows(1, 100), -rows(1, 100))
    table.place(new, positions(6), (1, 1))
    table.write_keys(new, rows(1, start=500))
    assert calls == ["overwrite", "place", "write_keys"]
    assert torch.equal(table.keys[:, :, 4:], rows(1, start=500))
    assert torch.equal(table.values[:, :, 4:], -rows(1, start=100))


@pytest.mark.parametrize("make", [growing, steady])
@pytest.mark.parametrize(("keys_type", "values_type"), [("float32", "float64"), ("float64", "float16")])
def test_prepared_calls_convert_what_is_of_another_type(calls, make, keys_type, values_type):
    """As under `torch.autocast`, which gives keys and values types of their own, and may be switched on after the prompt."""
    table = make()
    assert table.prepared is not None
    keys, values = rows(1, 100, getattr(torch, keys_type)), -rows(1, 300, getattr(torch, values_type))
    new = table.append(keys, values)
    table.place(new, positions(6), (1, 1))
    assert torch.equal(table.stored()[0][:, :, -1:], keys.float())
    assert torch.equal(table.stored()[1][:, :, -1:], values.float())
    table.write_keys(new, rows(1, 500, torch.float64))
    assert torch.equal(table.stored()[0][:, :, -1:], rows(1, 500)) and "write_keys" in calls
