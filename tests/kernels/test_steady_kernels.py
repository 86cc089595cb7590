"""Prepared calls give what checked calls give, follow what is written to the slots, and notice another kind of call."""

import pytest
import torch

from kvpress.kernels.attention import attend, attend_with_weights
from kvpress.kernels.attention.steady import SteadyAttention
from kvpress.kernels.eviction import weakest
from kvpress.kernels.eviction.steady import SteadyWeakest
from kvpress.kernels.native import missing
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
    steady = SteadyAttention(keys, values, given)
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
        output, weights = steady.attend(query, reduction=reduction, **options)
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
    steady = SteadyAttention(keys, values, given)
    query = torch.randn(2, 6, 1, 16)
    steady.attend(query, scaling=SCALING)
    kind = steady._kind
    assert kind is not None
    wide = query.double()
    assert torch.equal(steady.attend(wide, scaling=SCALING)[0], attend(wide, keys, values, scaling=SCALING)[0])
    assert steady._kind is None, "fp64 is not served by the kernels"
    strided = torch.randn(2, 1, 6, 16).transpose(1, 2)
    assert torch.equal(steady.attend(strided, scaling=SCALING)[0], attend(strided, keys, values, scaling=SCALING)[0])
    learning = query.clone().requires_grad_()
    assert steady.attend(learning, scaling=SCALING)[0].requires_grad


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
