"""The custom operators: schemas, fake implementations and mutation checked by torch, and graphs captured whole."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch.library import opcheck

from kvpress.kernels import operators
from kvpress.kernels.attention import attend, attend_with_weights
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.compaction import compact
from kvpress.kernels.eviction import RowWriter, weakest
from kvpress.kernels.head_vote import head_vote
from kvpress.kernels.pages import page_bounds, page_scores
from kvpress.kernels.rotation import rotate

torch.manual_seed(0)
QUERY, ROWS, KEYS = torch.randn(2, 6, 1, 64), torch.randn(2, 6, 5, 64), torch.randn(2, 2, 40, 64)
POSITIONS = torch.arange(40).expand(2, 1, 40).contiguous()
INDEX = torch.randint(-1, 40, (2, 2, 7))
ANGLES = torch.randn(1, 1, 40, 32)
RAGGED = {"starts": torch.tensor([[0, 9], [3, 4]]), "lengths": torch.tensor([[60, 5], [33, 0]])}
LOWEST, HIGHEST = page_bounds(KEYS, page_size=16)
STORED, SCALE = torch.ones(2, 2, 40, 64, dtype=torch.int8), torch.rand(2, 2, 40)

CASES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (operators.attend, (QUERY, KEYS, KEYS, 0.1), {}),
    (operators.attend, (ROWS, KEYS, KEYS, 0.1), {"causal": True, "softcap": 9.0, "sinks": torch.randn(6)}),
    (operators.attend, (QUERY.double(), KEYS.double(), KEYS.double(), 0.1), {"index": INDEX}),
    (operators.attend, (QUERY.bfloat16(), KEYS.bfloat16(), KEYS.bfloat16()[..., :32], 0.1), {"positions": POSITIONS}),
    (operators.attend, (QUERY, KEYS.view(-1, 64), KEYS.view(-1, 64), 0.1), RAGGED),
    (operators.attend, (QUERY, STORED, STORED, 0.1), {"keys_scale": SCALE, "values_scale": SCALE}),
    (operators.attend_with_weights, (QUERY, KEYS, KEYS, "max", 0.1), {"index": INDEX}),
    (operators.attend_with_weights, (QUERY, KEYS, KEYS, "mean", 0.1), {}),
    (operators.attention_mass, (ROWS, KEYS, 0.1), {"noise_seed": 3, "temperature": 1.5}),
    (operators.head_vote, (QUERY, KEYS), {}),
    (operators.page_bounds, (KEYS, 16), {"positions": POSITIONS}),
    (operators.page_scores, (QUERY, LOWEST, HIGHEST), {}),
    (operators.rotate, (KEYS, ANGLES.cos(), ANGLES.sin()), {"inverse": True}),
    (operators.compact, ([KEYS, POSITIONS.expand(2, 2, 40)], INDEX), {}),
    (operators.weakest, (torch.rand(2, 2, 40), POSITIONS, torch.tensor([[[4]]])), {}),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_opcheck(case: int) -> None:
    operator, arguments, options = CASES[case]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    assert set(opcheck(operator, arguments, options, test_utils=tests).values()) == {"SUCCESS"}


PUBLIC = [attend, attend_with_weights, attention_mass, head_vote, page_bounds, page_scores, rotate, compact, weakest]


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_parameters_are_those_of_the_public_function(public: Any) -> None:
    operator = getattr(operators, public.__name__)
    named = [argument.name for argument in operator._opoverload._schema.arguments]
    assert [*named, "impl"] == list(signature(public).parameters)


def test_every_operator_is_compared() -> None:
    every = {name for name, given in vars(operators).items() if isinstance(given, type(operators.attend))}
    assert every == {public.__name__ for public in PUBLIC}


def step(query: Any, keys: Any, positions: Any, index: Any, cosine: Any, sine: Any) -> tuple[Any, ...]:
    """Every operation once, as a decoded token might use them."""
    keys = rotate(keys, cosine, sine)
    output, lse = attend(query, keys, keys, scaling=0.1, positions=positions)
    chosen, _ = attend(query, keys, keys, scaling=0.1, index=index)
    _, _, weights = attend_with_weights(query, keys, keys, reduction="mean", scaling=0.1)
    mass = attention_mass(query, keys, scaling=0.1)
    votes = head_vote(query, keys)
    scores = page_scores(query, *page_bounds(keys, page_size=16))
    slot = weakest(weights, positions, sinks=4)
    kept = compact([keys, weights], index)
    weights = weights.clone()
    RowWriter([weights], (2, 2)).write(slot[..., None], [torch.full((2, 2), 7.0)])
    return output, lse, chosen, mass, votes, scores, slot, *kept, weights


def test_a_graph_is_captured_whole() -> None:
    arguments = (QUERY, KEYS, POSITIONS, INDEX, ANGLES[..., :32].cos(), ANGLES[..., :32].sin())
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
        eager = step(*arguments)
    for found, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(found, wanted)
    assert (compiled[-1] == 7.0).sum() == 4
