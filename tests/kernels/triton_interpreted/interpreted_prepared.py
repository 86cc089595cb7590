"""Prepared launches of attention, interpreted: call after call they equal the launches that look everything up."""

from __future__ import annotations

import pytest
import torch

from kvpress.kernels.attention.triton import attend
from kvpress.kernels.attention.triton_prepared import PreparedRow
from kvpress.kernels.attention.turned import attend_turned
from kvpress.kernels.packing import pack_int8

ABSENT = dict.fromkeys(("positions", "query_positions", "starts", "lengths", "index", "softcap", "sinks"))
CALL = {"positions": None, "index": None, "sinks": None, "rotation": None, "softcap": None, "weights": None}


def slots(generator, count=90, dim=32, batch=2):
    return torch.randn(2, batch, 2, count, dim, generator=generator)


def queries(generator, count, dim=32, batch=2):
    return torch.randn(count, batch, 6, 1, dim, generator=generator)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("weights", [None, "mean", "max"])
def test_more_slots_at_every_call(generator, monkeypatch, splits, weights):
    monkeypatch.setattr("kvpress.kernels.attention.triton_prepared.plan_splits", lambda *_: splits)
    keys, values = slots(generator)
    sinks = torch.randn(6, generator=generator)
    positions = torch.arange(90).view(1, 1, -1).repeat(2, 1, 1)
    positions[1, :, :9] = -1
    options = {"scaling": 0.3, "softcap": 4.0, "sinks": sinks}
    row = None
    for query, used in zip(queries(generator, 4), (1, 2, 64, 90), strict=True):
        seen = positions[:, :, :used]
        if row is None:
            row = PreparedRow(query, keys, values, {}, **CALL | options | {"positions": seen, "weights": weights})
        output, reduced = row(query, used, None, None)
        wanted = attend(
            query, keys[:, :, :used], values[:, :, :used], splits=splits, weights=weights,
            **ABSENT | options | {"positions": seen},
        )  # fmt: skip
        assert torch.equal(output, wanted[0])
        assert reduced is None if weights is None else torch.equal(reduced, wanted[2])
    assert (output != 0).any(-1).all()


@pytest.mark.parametrize("packed", [False, True])
def test_another_list_at_every_call(generator, packed):
    keys, values = slots(generator, batch=1)
    layout = {}
    if packed:
        keys, values = pack_int8(keys), pack_int8(values)
        layout = {
            name: rows[..., 32:].view(torch.float32)[..., 0]
            for name, rows in (("keys_scale", keys), ("values_scale", values))
        }
        keys, values = keys[..., :32], values[..., :32]
    row = None
    for query, listed in zip(queries(generator, 3, batch=1), (1, 7, 40), strict=True):
        index = torch.randint(-1, 90, (1, 1, listed), generator=generator)
        index[:, :, -1] = 3
        row = row or PreparedRow(query, keys, values, layout, **CALL | {"scaling": 0.2, "index": index})
        output, _ = row(query, 90, index, None)
        assert torch.equal(output, attend(query, keys, values, **ABSENT | layout | {"scaling": 0.2, "index": index})[0])


def test_ragged_heads(generator):
    keys, values = torch.randn(2, 80, 16, generator=generator).unbind()
    layout = {"starts": torch.tensor([[70, 0]]), "lengths": torch.tensor([[9, 66]])}
    row = None
    for query in queries(generator, 2, dim=16, batch=1):
        row = row or PreparedRow(query, keys, values, layout, **CALL | {"scaling": 0.25, "weights": "sum"})
        output, reduced = row(query, 66, None, None)
        wanted = attend(query, keys, values, weights="sum", **ABSENT | layout | {"scaling": 0.25})
        assert torch.equal(output, wanted[0]) and torch.equal(reduced, wanted[2]) and reduced.shape == (1, 2, 66)


def test_keys_are_turned_as_they_are_read(generator):
    keys, values = slots(generator, batch=1)
    angles = torch.outer(torch.arange(90.0), 100 ** -(torch.arange(16) / 16)).repeat(1, 2)
    tables = (angles.cos(), angles.sin())
    row = None
    for query, listed in zip(queries(generator, 3, batch=1), (5, 6, 50), strict=True):
        index = torch.randperm(90, generator=generator)[:listed].sort().values.view(1, 1, -1)
        row = row or PreparedRow(query, keys, values, {}, **CALL | {"scaling": 0.2, "index": index, "rotation": tables})
        output, _ = row(query, 90, index, tables)
        expected = attend_turned(query, keys, values, rotation=tables, scaling=0.2, index=index, impl="triton")[0]
        apart = attend_turned(query, keys, values, rotation=tables, scaling=0.2, index=index, impl="apart")[0]
        assert torch.equal(output, expected)
        torch.testing.assert_close(output, apart, atol=2e-6, rtol=1e-5)
        assert (output - attend(query, keys, values, **ABSENT | {"scaling": 0.2, "index": index})[0]).abs().max() > 1e-2
