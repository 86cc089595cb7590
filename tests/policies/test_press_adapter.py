"""Scorers of another library as policies: what they are shown, what they keep, and who is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvpress import PolicyCache
from kvpress.policies import KNorm, StreamingLLM
from kvpress.policies.base import Policy
from kvpress.policies.press import PressPolicy, UnsupportedPressError
from kvpress.testing.families import random_tokens, tiny_model


class NormPress:
    def score(
        self, module: Any, hidden_states: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        return -keys.norm(dim=-1)


class SinkPress:
    """By the index of a token: the first four and the last ones, which holds only where tokens come in order."""

    def score(
        self, module: Any, hidden_states: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        score = torch.arange(keys.shape[2], dtype=torch.float32).expand(keys.shape[:3]).clone()
        score[:, :, :4] += 1e6
        return score


class DifferencePress:
    def score(
        self, module: Any, hidden_states: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        mean = normalize(keys, p=2, dim=-1).mean(dim=2, keepdim=True)
        return values.norm(dim=-1) - 0.5 * cosine_similarity(keys, mean, dim=-1)


def kept(policy: Policy, ids: Tensor, mask: Tensor | None = None, family: str = "llama") -> tuple[list[Tensor], Tensor]:
    """Positions kept by each layer, and the tokens generated."""
    model = tiny_model(family)
    cache = PolicyCache(model, policy)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=12,
        do_sample=False,
    )
    return [cache.kept_positions(layer.layer_idx) for layer in cache.policy_layers], output


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize(
    ("press", "policy", "family"),
    [
        (NormPress(), KNorm, "llama"),  # not where keys are normalised: their norms differ by rounding alone
        (SinkPress(), StreamingLLM, "llama"),
        (SinkPress(), StreamingLLM, "gemma3"),
        (SinkPress(), StreamingLLM, "qwen3"),
    ],
    ids=["norm", "order", "order-sliding", "order-qwen3"],
)
def test_a_press_keeps_what_the_same_policy_keeps(press: Any, policy: Any, interval: int, family: str) -> None:
    ids = random_tokens(2, 40)
    ours, output = kept(PressPolicy(12, press=press, interval=interval), ids, family=family)
    theirs, expected = kept(policy(budget=12, interval=interval), ids, family=family)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        assert one.shape[-1] < 51 and (one >= 40).any()  # something went, and decoding went on
    assert torch.equal(output, expected)


def test_keys_and_values_are_those_of_the_tokens() -> None:
    """What stays after a prompt against scores made of a full cache, in fp64."""
    model, ids = tiny_model(), random_tokens(1, 40)
    full, cache = PolicyCache(model, "full"), PolicyCache(model, PressPolicy(12, press=DifferencePress()))
    with torch.no_grad():
        model(ids, past_key_values=full)
        model(ids, past_key_values=cache)
    for layer, stays in zip(full.policy_layers, cache.policy_layers, strict=True):
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        keys, values = keys[0].double(), values[0].double()
        mean = (keys / keys.norm(dim=-1, keepdim=True)).mean(dim=1, keepdim=True)
        cosine = (keys * mean).sum(-1) / (keys.norm(dim=-1) * mean.norm(dim=-1))
        best = (values.norm(dim=-1) - 0.5 * cosine).topk(12, dim=-1).indices.sort(dim=-1).values
        assert torch.equal(cache.kept_positions(stays.layer_idx)[0], best)


def test_a_padded_row_is_the_row_alone() -> None:
    long, short = random_tokens(1, 40, seed=1), random_tokens(1, 25, seed=2)
    padded = torch.cat([long, torch.cat([torch.zeros(1, 15, dtype=torch.long), short], dim=1)])
    mask = torch.ones_like(padded)
    mask[1, :15] = 0
    for press in (NormPress(), SinkPress(), DifferencePress()):
        together, _ = kept(PressPolicy(12, press=press), padded, mask)
        for row, ids in ((0, long), (1, short)):
            alone, _ = kept(PressPolicy(12, press=press), ids)
            for one, other in zip(together, alone, strict=True):
                assert torch.equal(one[row], other[0])


class Asks:
    """A press that looks at one thing."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def score(self, module: Any, hidden_states: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Any:
        assert attentions is None
        self.look(module, hidden_states, keys, kwargs)
        return keys[..., 0]


@pytest.mark.parametrize(
    ("look", "what"),
    [
        (lambda module, hidden, keys, kwargs: hidden.shape, "hidden_states"),
        (lambda module, hidden, keys, kwargs: torch.nn.functional.linear(hidden, keys[0, 0]), "hidden_states"),
        (lambda module, hidden, keys, kwargs: torch.stack(tensors=[keys], out=hidden), "hidden_states"),
        (lambda module, hidden, keys, kwargs: hidden[:, -4:], "hidden_states"),
        (lambda module, hidden, keys, kwargs: keys @ hidden, "hidden_states"),
        (lambda module, hidden, keys, kwargs: 2 * hidden, "hidden_states"),
        (lambda module, hidden, keys, kwargs: module.q_proj, "the attention module"),
        (lambda module, hidden, keys, kwargs: kwargs["position_embeddings"], "kwargs"),
        (lambda module, hidden, keys, kwargs: kwargs.get("position_ids"), "kwargs"),
    ],
)
def test_a_press_of_something_else_is_refused(look: Any, what: str) -> None:
    with pytest.raises(UnsupportedPressError, match=f"Asks uses {what}, which an eviction policy is not shown"):
        kept(PressPolicy(12, press=Asks(look)), random_tokens(1, 30))


def test_a_press_may_know_its_layer() -> None:
    layers: list[int] = []
    kept(PressPolicy(12, press=Asks(lambda module, *rest: layers.append(module.layer_idx))), random_tokens(1, 30))
    assert set(layers) == {0, 1}


def test_what_cannot_be_a_press() -> None:
    with pytest.raises(TypeError, match="must have a method score"):
        PressPolicy(12, press=object())
    with pytest.raises(ValueError, match="one for all heads"):
        PressPolicy(((4, 8), 12), press=NormPress())
    with pytest.raises(ValueError, match="cannot be made from a dictionary"):
        PressPolicy.from_dict({})

    class Short:
        def score(self, module: Any, hidden_states: Any, keys: Tensor, *rest: Any) -> Tensor:
            return keys[:, :, 1:, 0]

    with pytest.raises(UnsupportedPressError, match=r"must return \(1, 2, 30\), got \(1, 2, 29\)"):
        kept(PressPolicy(12, press=Short()), random_tokens(1, 30))
    with pytest.raises(UnsupportedPressError, match="makes other keys"):
        kept(PressPolicy(12, press=NormPress()), random_tokens(1, 30), family="deepseek_v3")


def test_a_report_names_the_press() -> None:
    cache = PolicyCache(tiny_model(), PressPolicy(12, press=NormPress()))
    assert cache.report().to_dict()["policies"] == [
        {"name": "press", "budget": 12, "interval": 1, "press": "NormPress"}
    ]
