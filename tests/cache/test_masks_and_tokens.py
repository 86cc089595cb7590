"""Where the tokens of a forward stand, and which are padding: by hand."""

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import causal_mask_function

from kvpress import PolicyCache
from kvpress.attention import check_call
from kvpress.errors import CacheStateError, UnsupportedModelError
from kvpress.masks import LogicalLength, padding_mask
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.tokens import TokenClock, Tokens

CPU = torch.device("cpu")


def read(before, rows, mask=None):
    given = None if mask is None else torch.tensor(mask, dtype=torch.bool)[:, None, None]
    return TokenClock().read(before, rows, given, CPU)


def test_rows_that_are_alike():
    tokens = read((3, 3), 4)
    assert tokens.positions.tolist() == [[3, 4, 5, 6]] and tokens.positions.dtype == torch.int32
    assert (tokens.rows, tokens.counts, tokens.seen, tokens.newest) == (4, (4, 4), (7, 7), 6)
    assert not tokens.padded
    assert read((0,), 1).newest == 0


def test_rows_of_unequal_length():
    tokens = read((3, 5), 2)
    assert tokens.positions.tolist() == [[3, 4], [5, 6]] and tokens.positions.dtype == torch.int32
    assert tokens.seen == (5, 7) and tokens.newest.tolist() == [[[4]], [[6]]] and tokens.newest.dtype == torch.int32


def test_padding():
    tokens = read((0, 2), 3, [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    assert tokens.positions.tolist() == [[-1, 0, 1], [2, 3, 4]]
    assert tokens.counts == (2, 3) and tokens.seen == (2, 5) and tokens.padded
    assert tokens.newest.tolist() == [[[1]], [[4]]]
    holes = read((1, 1), 3, [[1, 1, 0, 1], [1, 0, 1, 0]])
    assert holes.positions.tolist() == [[1, -1, 2], [-1, 1, -1]] and holes.counts == (2, 1)
    none = read((2, 2), 2, [[0, 0, 1, 1], [1, 1, 1, 1]])  # the padding lies before these
    assert none.positions.tolist() == [[2, 3]] and none.newest == 3 and not none.padded
    nothing = read((4, 4), 1, [[0], [0]])
    assert (
        nothing.positions.tolist() == [[-1], [-1]] and nothing.seen == (4, 4) and nothing.newest.tolist() == [[[3]]] * 2
    )


def test_a_forward_shares_its_tokens():
    clock = TokenClock()
    mask = torch.tensor([[0, 1, 1]], dtype=torch.bool)[:, None, None]
    first = clock.read((0,), 3, mask, CPU)
    assert clock.read((0,), 3, mask, CPU) is first
    assert clock.read((0,), 2, mask, CPU) is not first
    assert clock.read((0,), 3, mask, CPU) is not first
    assert clock.read((0,), 3, None, CPU).counts == (3,)
    there = clock.read((0,), 3, None, torch.device("meta"))
    assert there.positions.device.type == "meta" and there.newest == 2
    moved = Tokens(1, (1, 0), (2, 1), torch.zeros(2, 1), torch.ones(2, 1, 1)).to(torch.device("meta"))
    assert moved.newest.device.type == moved.positions.device.type == "meta" and moved.seen == (2, 1)
    clock.clear()
    assert clock.read((0,), 3, None, CPU) is not there
    ids = torch.arange(3)
    assert clock.same_ids(ids) is ids and clock.same_ids(ids.clone()) is ids


def test_positions_that_do_not_continue():
    clock = TokenClock()
    tokens = clock.read((2,), 3, None, CPU)
    clock.check_positions(tokens, 9, None)
    clock.check_positions(tokens, 9, torch.zeros(3, 1, 3))
    clock.check_positions(tokens, 9, torch.tensor([[2, 3, 4]]))  # padding not counted
    clock.check_positions(tokens, 9, torch.tensor([[0, 1, 2]]))  # looked at once a forward
    for wrong, seen in ((3, 9), (5, 9), (7, 9), (9, 9)):
        clock.clear()
        with pytest.raises(
            CacheStateError,
            match=rf"position_ids must continue the {seen - 3} tokens seen and end at 4, they end at {wrong}: ",
        ):
            clock.check_positions(tokens, seen, torch.tensor([[wrong - 2, wrong - 1, wrong]]))
    clock.clear()
    clock.check_positions(tokens, 9, torch.tensor([[6, 7, 8]]))  # padding counted
    clock.clear()
    clock.check_positions(clock.read((2,), 1, None, CPU), 9, torch.tensor([[40]]))  # a decoded token is not looked at


def test_positions_of_the_first_row_are_looked_at():
    tokens = read((2, 5), 3)
    clock = TokenClock()
    clock.check_positions(tokens, 9, torch.tensor([[2, 3, 4], [5, 6, 7]]))
    for wrong in (7, 5):
        clock.clear()
        with pytest.raises(CacheStateError, match=f"and end at 4, they end at {wrong}: "):
            clock.check_positions(tokens, 9, torch.tensor([[wrong - 2, wrong - 1, wrong], [2, 3, 4]]))


def mask_of(mask, length, **changes):
    given = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    arguments = {"kv_length": LogicalLength(length), "attention_mask": given, "config": tiny_model().config}
    return padding_mask(**{"mask_function": causal_mask_function, **arguments, **changes})


def test_mask_of_a_compressed_layer():
    assert mask_of(None, 3) is None
    found = mask_of([[0, 1, 1], [1, 1, 1]], 3)
    assert found.shape == (2, 1, 1, 3) and found[:, 0, 0].tolist() == [[False, True, True], [True, True, True]]
    longer = mask_of([[0, 1], [1, 1], [1, 1]], 7)  # tokens fed without a mask of their own are real
    assert longer.dtype == torch.bool and longer[:, 0, 0].tolist() == [[False] + [True] * 6, [True] * 7, [True] * 7]
    shorter = mask_of([[0, 1, 1, 0]], 2)
    assert shorter[:, 0, 0].tolist() == [[False, True]]
    with pytest.raises(UnsupportedModelError, match="must be causal plus padding"):
        mask_of(None, 3, mask_function=lambda *arguments: True)


def test_a_window_over_a_compressed_layer_is_refused_where_it_is_used():
    """Some models make a mask for layers that slide though none of theirs does."""
    unused = mask_of([[0, 1, 1]], 3, local_size=2, mask_function=lambda *arguments: True)
    assert unused.shape == (0,)
    with pytest.raises(UnsupportedModelError, match="attention_mask must be 2-D padding"):
        check_call(unused, 0.0, {})
    check_call(mask_of([[0, 1, 1]], 3), 0.0, {})


def test_a_stock_cache_gets_the_mask_of_the_models_own_attention():
    model, ids = tiny_model(), random_tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
        PolicyCache(model, "full")
        assert model.config._attn_implementation == "kvpress"
        found = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(found[mask.bool()], wanted[mask.bool()]) and wanted.std() > 0.1
