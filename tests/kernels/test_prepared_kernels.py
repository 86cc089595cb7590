"""Prepared calls give what checked calls give, follow what is written to the slots, and notice another kind of call."""

import pytest
import torch

from kvpress.kernels.attention import attend, attend_with_weights
from kvpress.kernels.attention.prepared import PreparedAttention
from kvpress.kernels.attention.turned import attend_turned
from kvpress.kernels.eviction import weakest
from kvpress.kernels.eviction.steady import SteadyWeakest
from kvpress.kernels.native import missing
from kvpress.kernels.rotation import rotate
from kvpress.kernels.rotation.prepared import PreparedRotation
from kvpress.row_format import row_format

SCALING = 0.3


def slots(kind, layout):
    """Keys, values and their layout: `[2, 3, 40, 16]`, or flat rows of heads of unequal length."""
    generator = torch.Generator().manual_seed(1)
    form = row_format(kind)
    shape = (2, 3, 40, 16) if layout == "dense" else (150, 16)
    stored = [form.pack(torch.randn(shape, generator=generator)) for _ in range(2)]
    (keys, keys_scale), (values, values_scale) = (form.parts(each) for each in stored)
    found = {} if keys_scale is None else {"keys_scale": keys_scale, "values_scale": values_scale}
    if layout == "flat":
        lengths = torch.tensor([[40, 20, 25], [10, 30, 25]])
        found |= {"lengths": lengths, "starts": (lengths.view(-1).cumsum(0) - lengths.view(-1)).view(2, 3)}
    return stored, keys, values, found


@pytest.mark.parametrize("reduction", [None, "mean", "sum", "max"])
@pytest.mark.parametrize("layout", ["dense", "flat"])
@pytest.mark.parametrize("kind", [None, "bfloat16", "int8"])
def test_attention_is_that_of_checked_calls(kind, layout, reduction):
    stored, keys, values, given = slots(kind, layout)
    prepared = PreparedAttention(keys, values, given)
    positions = torch.arange(40, dtype=torch.int32).expand(2, 3, 40).contiguous()
    sinks, other = torch.randn(6), torch.randn(6)
    calls = [
        {"scaling": SCALING},
        {"scaling": SCALING},
        {"scaling": 2 * SCALING},
        {"scaling": SCALING, "positions": positions},
        {"scaling": SCALING, "positions": positions},
        {"scaling": SCALING, "sinks": sinks, "softcap": 5.0},
        {"scaling": SCALING, "sinks": sinks, "softcap": 5.0},
        {"scaling": SCALING, "sinks": other, "softcap": 5.0},
        {"scaling": SCALING, "sinks": other.double()},
    ]
    outputs = []
    for number, options in enumerate(calls):
        query = torch.randn(2, 6, 1, 16, generator=torch.Generator().manual_seed(number))
        positions[0, 1, number] = -1
        for each in stored:  # a token is written in place
            each.view(-1, each.shape[-1])[number] = each.view(-1, each.shape[-1])[number + 20].clone()
        output, weights = prepared.attend(query, 40, reduction=reduction, **options)
        if reduction is None:
            expected, expected_weights = attend(query, keys, values, **options, **given)[0], None
        else:
            expected, _, expected_weights = attend_with_weights(
                query, keys, values, reduction=reduction, **options, **given
            )
        assert torch.equal(output, expected)
        assert (weights is None) == (expected_weights is None)
        assert weights is None or torch.equal(weights, expected_weights)
        outputs.append(output)
    assert not any(torch.equal(outputs[0], each) for each in outputs[1:])


@pytest.mark.skipif(missing is not None, reason="no native kernels")
def test_calls_are_prepared_and_other_queries_are_noticed():
    _, keys, values, given = slots(None, "dense")
    prepared = PreparedAttention(keys, values, given)
    query = torch.randn(2, 6, 1, 16)
    prepared.attend(query, 40, scaling=SCALING)
    kind = prepared._kind
    assert kind is not None
    wide = query.double()
    assert torch.equal(prepared.attend(wide, 40, scaling=SCALING)[0], attend(wide, keys, values, scaling=SCALING)[0])
    assert prepared._kind is None, "fp64 is not served by the kernels"
    strided = torch.randn(2, 1, 6, 16).transpose(1, 2)
    assert torch.equal(
        prepared.attend(strided, 40, scaling=SCALING)[0], attend(strided, keys, values, scaling=SCALING)[0]
    )
    learning = query.clone().requires_grad_()
    assert prepared.attend(learning, 40, scaling=SCALING)[0].requires_grad


@pytest.mark.parametrize("reduction", [None, "max"])
@pytest.mark.parametrize("kind", [None, "bfloat16", "int8"])
def test_more_slots_and_other_lists_of_them_need_no_new_preparation(kind, reduction):
    _, keys, values, given = slots(kind, "dense")
    prepared = PreparedAttention(keys, values, given)
    generator = torch.Generator().manual_seed(5)
    column = torch.arange(40, dtype=torch.int32).expand(2, 3, 40).contiguous()
    column[1, :, :3] = -1
    kinds, outputs = [], []
    for listed in (False, True):
        for used in (20, 21, 33, 40):
            query = torch.randn(2, 6, 1, 16, generator=generator)
            index = torch.randint(-1, used, (2, 3, 12), generator=generator) if listed else None
            positions = column[:, :, :used]
            options = {"scaling": SCALING, "index": index, "positions": positions}
            output, weights = prepared.attend(query, used, reduction=reduction, **options)
            kinds.append(prepared._kind)
            layout = {name: scale[:, :, :used] for name, scale in given.items()}
            call = (query, keys[:, :, :used], values[:, :, :used])
            if reduction is None:
                assert torch.equal(output, attend(*call, **options, **layout)[0])
            else:
                expected, _, expected_weights = attend_with_weights(*call, reduction=reduction, **options, **layout)
                assert torch.equal(output, expected)
                assert torch.equal(weights, expected_weights)
            outputs.append(output)
    assert not any(torch.equal(outputs[0], each) for each in outputs[1:])
    if missing is None:
        assert kinds[0] is not None and len(set(kinds)) == 2, "one preparation for all slots, one for lists"


@pytest.mark.parametrize("kind", [None, "int8"])
def test_prepared_calls_turn_keys_by_the_tables_of_each_call(kind):
    _, keys, values, given = slots(kind, "dense")
    prepared = PreparedAttention(keys, values, given)
    generator = torch.Generator().manual_seed(6)
    outputs = []
    for number in range(4):
        angles = torch.rand(12, 8, generator=generator).repeat(1, 2)
        rotation = (angles.cos(), angles.sin())
        query = torch.randn(2, 6, 1, 16, generator=generator)
        index = torch.randint(0, 30 + number, (2, 1, 12), generator=generator)
        output, _ = prepared.attend(query, 30 + number, scaling=SCALING, index=index, rotation=rotation)
        expected, _ = attend_turned(query, keys, values, rotation=rotation, scaling=SCALING, index=index, **given)
        assert torch.equal(output, expected)
        outputs.append(output)
    assert not any(torch.equal(outputs[0], each) for each in outputs[1:])


def test_a_list_beyond_the_slots_in_use_is_refused_by_prepared_calls():
    _, keys, values, given = slots(None, "dense")
    prepared = PreparedAttention(keys, values, given)
    query, index = torch.randn(2, 6, 1, 16), torch.tensor([[[3, 29]]])
    for _ in range(2):
        prepared.attend(query, 30, scaling=SCALING, index=index)
    with pytest.raises(IndexError):
        prepared.attend(query, 29, scaling=SCALING, index=index)


def test_rotations_by_the_same_tables_are_those_of_checked_calls():
    angles = torch.rand(2, 1, 1, 8, generator=torch.Generator().manual_seed(7)).repeat(1, 1, 1, 2)
    outputs = []
    for inverse in (False, True):
        prepared = PreparedRotation(angles.cos(), angles.sin(), inverse=inverse)
        for heads, dtype in ((6, torch.float32), (3, torch.float32), (6, torch.bfloat16), (6, torch.float64)) * 2:
            rows = torch.randn(2, 1, heads, 16, generator=torch.Generator().manual_seed(heads)).to(dtype)
            rotated = prepared.rotate(rows.transpose(1, 2))
            assert torch.equal(rotated, rotate(rows.transpose(1, 2), angles.cos(), angles.sin(), inverse=inverse))
            assert not torch.equal(rotated, rows.transpose(1, 2))
            outputs.append(rotated)
    assert not torch.equal(outputs[0], outputs[8])
    learning = torch.randn(2, 6, 1, 16, requires_grad=True)
    for _ in range(2):
        assert prepared.rotate(learning).requires_grad


@pytest.mark.skipif(missing is not None, reason="no native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rotated_where_they_lie(level, dtype):
    angles = torch.rand(2, 1, 1, 8, generator=torch.Generator().manual_seed(7)).repeat(1, 1, 1, 2)
    prepared = PreparedRotation(angles.cos(), angles.sin(), inverse=True)
    room = torch.randn(2, 3, 10, 20, generator=torch.Generator().manual_seed(8)).to(dtype)
    for buffer in (room, room.transpose(0, 1).contiguous().transpose(0, 1), room[:, :, :, :16]):
        for slot in (4, 9, 0):
            expected = buffer.clone()
            expected[:, :, slot : slot + 1] = prepared.rotate(buffer[:, :, slot : slot + 1])
            before = buffer.clone()
            assert prepared.rotate_in_place(buffer, slot)
            assert torch.equal(buffer, expected)
            assert not torch.equal(buffer, before)
    assert not prepared.rotate_in_place(room.double(), 3)
    long = PreparedRotation(angles.cos().expand(2, 1, 2, 16), angles.sin().expand(2, 1, 2, 16))
    assert not long.rotate_in_place(room, 3)


def test_the_weakest_slot_is_that_of_checked_calls():
    positions = torch.arange(30, dtype=torch.int32).expand(2, 3, 30).contiguous()
    lengths = torch.tensor([[30, 20, 25], [10, 30, 25]])
    found = set()
    for given in (None, lengths):
        steady = SteadyWeakest(positions, given)
        for number in range(6):
            scores = torch.randn(2, 3 if number != 4 else 1, 30, generator=torch.Generator().manual_seed(number))
            limits = (2, 25) if number != 3 else (torch.tensor([[[2]]]), torch.tensor([[[8]], [[20]]]))
            slot = steady.find(scores, *limits)
            expected = weakest(scores, positions, sinks=limits[0], first_recent=limits[1], lengths=given)
            assert torch.equal(slot, expected)
            found.add(tuple(slot.view(-1).tolist()))
            positions.scatter_(-1, slot[..., None], 40 + number)
    assert len(found) > 6


def test_a_row_of_tables_rotates_as_tables_of_one_row():
    angles = torch.rand(1, 1, 5, 8, generator=torch.Generator().manual_seed(7)).repeat(1, 1, 1, 2)
    whole = PreparedRotation(angles.cos(), angles.sin(), inverse=True)
    rows = torch.randn(2, 3, 1, 20, generator=torch.Generator().manual_seed(8))
    outputs = []
    for row in (0, 3, 4, 3):
        part = whole.row(row)
        expected = rotate(rows, angles.cos()[:, :, row : row + 1], angles.sin()[:, :, row : row + 1], inverse=True)
        for _ in range(2):
            assert torch.equal(part.rotate(rows), expected)
        outputs.append(expected)
    assert torch.equal(outputs[1], outputs[3]) and not torch.equal(outputs[1], outputs[2])
    if missing is None:
        assert len(whole._rows) == 1, "looked up once for all rows"
