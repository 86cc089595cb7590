"""Attention over slots, interpreted, against fp64."""

from __future__ import annotations

import pytest
import torch

from kvpress.kernels.attention import reference
from kvpress.kernels.attention.triton import attend

ABSENT = dict.fromkeys(("positions", "query_positions", "starts", "lengths", "index", "softcap", "sinks"))


def make(generator, batch=1, kv_heads=2, group=2, rows=1, slots=65, dim=64, value_dim=None, dtype=torch.float32):
    query = torch.randn(batch, kv_heads * group, rows, dim, generator=generator).to(dtype)
    keys = torch.randn(batch, kv_heads, slots, dim, generator=generator).to(dtype)
    values = torch.randn(batch, kv_heads, slots, value_dim or dim, generator=generator).to(dtype)
    return query, keys, values


def compare(within_budget, oracle, query, keys, values, splits=None, **options):
    """Kernel against oracle; returns the output, so that a test can ask more of it."""
    arguments = ABSENT | {"scaling": query.shape[-1] ** -0.5} | options
    output, lse, _ = attend(query, keys, values, splits=splits, **arguments)
    exact_output, exact_lse, _ = oracle(query, keys, values, **arguments)
    reference_output, reference_lse, _ = reference.attend(query, keys, values, **arguments)
    assert output.dtype == query.dtype and lse.dtype == torch.float32
    within_budget(output, exact_output, reference_output)
    within_budget(lse, exact_lse, reference_lse)
    return output, lse


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("splits", [1, 3])
def test_head_sizes(generator, within_budget, oracle, dim, splits):
    compare(within_budget, oracle, *make(generator, dim=dim), splits=splits)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("slots", [1, 63, 65])
@pytest.mark.parametrize("splits", [1, 2])
def test_groups_and_lengths(generator, within_budget, oracle, group, slots, splits):
    compare(within_budget, oracle, *make(generator, group=group, slots=slots, dim=16), splits=splits)


@pytest.mark.parametrize("slots", [1000, 4097])
def test_long(generator, within_budget, oracle, slots):
    compare(within_budget, oracle, *make(generator, kv_heads=1, slots=slots, dim=16), splits=4)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rows", [2, 23])
def test_rows_are_causal_by_position(generator, within_budget, oracle, splits, rows):
    query, keys, values = make(generator, batch=2, group=3, rows=rows, slots=70, dim=16)
    positions = torch.stack([torch.randperm(70, generator=generator) for _ in range(4)]).view(2, 2, 70)
    positions[:, :, 5] = -1
    query_positions = torch.arange(70 - rows, 70)[None].repeat(2, 1)
    query_positions[1] -= 35  # more than one block of rows where there are 23: three heads are packed
    query_positions[0, 0] = -1  # padding: sees nothing
    output, lse = compare(
        within_budget, oracle, query, keys, values, splits, positions=positions, query_positions=query_positions
    )
    assert (output[0, :, 0] == 0).all() and (lse[0, :, 0] == -torch.inf).all()
    assert (output[1, :, -1] != 0).any(-1).all()


def test_later_slots_are_skipped(generator):
    """A block of rows stops at the last slot it may see: what lies behind may hold anything, NaN included."""
    query, keys, values = make(generator, group=1, rows=40, slots=200, dim=16)
    keys[:, :, 64:], values[:, :, 64:] = torch.nan, torch.nan
    positions, query_positions = torch.arange(200).view(1, 1, -1), torch.arange(24, 64)[None]
    options = ABSENT | {"scaling": 0.25, "positions": positions, "query_positions": query_positions}
    output, _, _ = attend(query, keys, values, **options)
    part = ABSENT | {"scaling": 0.25, "positions": positions[..., :64], "query_positions": query_positions}
    expected, _, _ = attend(query, keys[:, :, :64], values[:, :, :64], **part)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("splits", [1, 2])
def test_index_list(generator, within_budget, oracle, heads, dtype, splits):
    query, keys, values = make(generator, batch=2, slots=90, dim=16)
    index = torch.randint(0, 90, (2, heads, 71), generator=generator, dtype=dtype)
    index[:, :, 3:9] = -1
    index[:, :, 10:14] = index[:, :, 9:10]  # listed five times
    output, _ = compare(within_budget, oracle, query, keys, values, splits, index=index)
    once = index.clone()
    once[:, :, 10:14] = -1
    assert (attend(query, keys, values, **(ABSENT | {"scaling": 0.25, "index": once}))[0] - output).abs().max() > 1e-4


def test_index_with_positions(generator, within_budget, oracle):
    query, keys, values = make(generator, rows=3, slots=90, dim=16)
    positions = torch.arange(90).view(1, 1, -1).clone()
    positions[..., 7] = -1
    index = torch.tensor([[[7, 80, 2, -1, 88, 89, 2]]])
    compare(
        within_budget, oracle, query, keys, values,
        index=index, positions=positions, query_positions=torch.tensor([[1, 80, 89]]),
    )  # fmt: skip


@pytest.mark.parametrize("index", [torch.full((1, 1, 4), -1), torch.empty(1, 1, 0, dtype=torch.long)])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, -torch.inf])])
def test_empty_selection_gives_zero(generator, index, splits, sinks):
    query, keys, values = make(generator, dim=16)
    options = ABSENT | {"scaling": 1.0, "index": index, "sinks": sinks}
    output, lse, _ = attend(query, keys, values, splits=splits, **options)
    assert (output == 0).all()
    expected = torch.full((4,), -torch.inf) if sinks is None else sinks
    torch.testing.assert_close(lse[0, :, 0], expected)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_ragged(generator, within_budget, oracle, splits, rows):
    query, _, _ = make(generator, batch=2, rows=rows, dim=16)
    lengths = torch.tensor([[65, 0], [130, 7]])
    starts = torch.tensor([[140, 3], [0, 131]])  # neither in order nor without gaps
    keys, values = torch.randn(2, 210, 16, generator=generator).unbind()
    output, _ = compare(within_budget, oracle, query, keys, values, splits, starts=starts, lengths=lengths)
    assert (output[0, 2:] == 0).all() and (output[1] != 0).any(-1).all()
    positions = torch.randint(-1, 200, (2, 2, 130), generator=generator)
    masks = {"positions": positions, "query_positions": torch.full((1, rows), 120)}
    compare(within_budget, oracle, query, keys, values, splits, starts=starts, lengths=lengths, **masks)
    index = torch.randint(-1, 130, (2, 2, 33), generator=generator)
    compare(within_budget, oracle, query, keys, values, splits, starts=starts, lengths=lengths, index=index)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_softcap_and_sinks(generator, within_budget, oracle, splits, rows):
    query, keys, values = make(generator, rows=rows, dim=16)
    sinks = torch.tensor([3.0, -2.0, 0.0, -torch.inf])
    compare(within_budget, oracle, query * 4, keys, values, splits, sinks=sinks, softcap=5.0)
    capped, _, _ = attend(query * 4, keys, values, **(ABSENT | {"scaling": 1.0, "softcap": 5.0}))
    plain, _, _ = attend(query * 4, keys, values, **(ABSENT | {"scaling": 1.0}))
    assert (capped - plain).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 17])
def test_half_precision(generator, within_budget, oracle, dtype, rows):
    compare(within_budget, oracle, *make(generator, rows=rows, dim=80, value_dim=48, dtype=dtype))


@pytest.mark.parametrize("flat", [False, True])
def test_int8_storage(generator, within_budget, flat):
    """int8 rows with a scale each equal the same rows multiplied out in fp64; integers up to 127 are exact in every
    arithmetic.
    """
    query, _, _ = make(generator, slots=70, dim=32)
    keys, values = torch.randint(-127, 128, (2, 1, 2, 70, 32), generator=generator, dtype=torch.int8).unbind()
    keys_scale, values_scale = (torch.rand(2, 1, 2, 70, generator=generator) * 0.02 + 0.001).unbind()
    options = ABSENT | {"scaling": 0.2}
    wide = [slots.double() * scale[..., None].double() for slots, scale in ((keys, keys_scale), (values, values_scale))]
    exact = reference.attend(query.double(), *wide, **options)
    scales = {"keys_scale": keys_scale, "values_scale": values_scale}
    expected = reference.attend(query, keys, values, **options, **scales)
    if flat:
        keys, values = keys.reshape(140, 32), values.reshape(140, 32)
        scales = {name: scale.reshape(140) for name, scale in scales.items()}
        options |= dict(starts=torch.tensor([[0, 70]]), lengths=torch.tensor([[70, 70]]))
    for splits in (1, 2):
        output, lse, _ = attend(query, keys, values, splits=splits, **options, **scales)
        within_budget(output, exact[0], expected[0])
        within_budget(lse, exact[1], expected[1])


def test_addresses_beyond_two_to_the_31(generator, reserved):
    """Head, slot and list strides whose products leave 32 bits, over a mapping that is touched in a few places only."""
    query, keys, values = make(generator, kv_heads=2, slots=5, dim=16, dtype=torch.float16)
    far = reserved(2**32 + 2**10).as_strided((1, 2, 5, 16), (0, 2**31 + 64, 2**29, 1))
    positions = torch.arange(5).view(1, 1, -1)
    options = ABSENT | dict(scaling=0.25, positions=positions, query_positions=torch.tensor([[4]]))
    for index in (None, torch.tensor([[[4, 0, -1, 3]]], dtype=torch.int32)):
        options["index"] = index
        near = attend(query, keys, values, **options)[0]
        far.copy_(keys)
        assert torch.equal(attend(query, far, values, **options)[0], near)
        far.copy_(values)
        assert torch.equal(attend(query, keys, far, **options)[0], near)
    assert (near != 0).any()


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_narrower_storage(generator, within_budget, oracle, storage):
    query, keys, values = make(generator, dim=32)
    compare(within_budget, oracle, query, keys.to(storage), values.to(storage))


def test_non_contiguous(generator, within_budget, oracle):
    query, keys, values = make(generator, batch=2, rows=3, slots=66, dim=16)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    keys = keys.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)  # not even the last dimension is
    values = torch.cat([values, values], -1)[..., ::2]
    positions = torch.arange(132).view(1, 1, -1)[..., ::2]
    assert not keys.is_contiguous() and keys.stride(-1) != 1
    masks = {"positions": positions, "query_positions": torch.tensor([[4, 60, 131]])}
    compare(within_budget, oracle, query, keys, values, **masks)


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("splits", [1, 2])
def test_weights(generator, within_budget, oracle, reduction, splits):
    query, keys, values = make(generator, batch=2, group=3, slots=70, dim=16)
    positions = torch.arange(70).view(1, 1, -1).repeat(2, 1, 1)
    positions[0, 0, 40:] = -1
    options = ABSENT | {"scaling": 0.25, "positions": positions, "sinks": torch.zeros(6)}
    _, _, weights = attend(query, keys, values, splits=splits, weights=reduction, **options)
    _, _, expected = reference.attend(query, keys, values, weights=reduction, **options)
    _, _, exact = oracle(query, keys, values, **options)
    reduce = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}[reduction]
    within_budget(weights, reduce(exact[:, :, 0].view(2, 2, 3, 70), 2), expected)
    assert (weights[0, :, 40:] == 0).all() and (weights > 0).any()


def test_weights_of_ragged_heads(generator, within_budget):
    query, _, _ = make(generator, dim=16)
    keys, values = torch.randn(2, 80, 16, generator=generator).unbind()
    options = ABSENT | dict(scaling=0.25, starts=torch.tensor([[70, 0]]), lengths=torch.tensor([[9, 66]]))
    _, _, weights = attend(query, keys, values, weights="sum", **options)
    _, _, expected = reference.attend(query, keys, values, weights="sum", **options)
    _, _, exact = reference.attend(query.double(), keys.double(), values.double(), weights="sum", **options)
    within_budget(weights, exact, expected)
    assert weights.shape == (1, 2, 66) and (weights[0, 0, 9:] == 0).all()


@pytest.mark.parametrize("rotate_by", ["position", "entry"])
def test_rotation_on_load(generator, within_budget, rotate_by):
    """Keys stored unrotated and turned as they are read equal keys that were stored rotated."""
    query, keys, values = make(generator, slots=70, dim=32)
    positions = torch.randperm(70, generator=generator).view(1, 1, -1)
    index = torch.randperm(70, generator=generator)[:50].view(1, 1, -1)
    angles = torch.outer(torch.arange(70.0), 100 ** -(torch.arange(8) / 8)).repeat(1, 2)
    places = positions
    if rotate_by == "entry":
        places = torch.zeros(1, 1, 70).long().scatter(2, index, torch.arange(50)[None, None])
    turn = angles[places]  # [1, 1, slots, rotary_dim]
    rotary = keys[..., :16]
    half = torch.cat([-rotary[..., 8:], rotary[..., :8]], -1)
    stored = torch.cat([rotary * turn.cos() + half * turn.sin(), keys[..., 16:]], -1)
    options = ABSENT | {"scaling": 0.3, "positions": positions, "index": index}
    output, _, _ = attend(query, keys, values, rotation=(angles.cos(), angles.sin()), rotate_by=rotate_by, **options)
    wide = [tensor.double() for tensor in (query, stored, values)]
    exact, _, _ = reference.attend(*wide, **options)
    expected, _, _ = reference.attend(query, stored, values, **options)
    within_budget(output, exact, expected)
    assert (reference.attend(query, keys, values, **options)[0] - expected).abs().max() > 1e-2


def test_gaps_in_the_launch_are_refused(generator):
    query, keys, values = make(generator, dim=16)
    with pytest.raises(ValueError, match="splits must be at least 1, got 0"):
        attend(query, keys, values, splits=0, **(ABSENT | {"scaling": 1.0}))
    tables = (torch.zeros(9, 3), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="even rotary_dim"):
        attend(query, keys, values, rotation=tables, rotate_by="entry", **(ABSENT | {"scaling": 1.0}))
    with pytest.raises(ValueError, match="positions must be given"):
        attend(query, keys, values, rotation=tables, **(ABSENT | {"scaling": 1.0}))
