"""A policy that asks for what it did not declare is told what to declare."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from kvpress import PolicyCache
from kvpress.observation import Observation
from kvpress.policies import EvictionPolicy
from kvpress.testing.families import random_tokens, tiny_model


@dataclass(frozen=True)
class Asking(EvictionPolicy):
    """Evicts by position, and asks for something as it observes."""

    name: ClassVar[str] = "asking"
    columns: ClassVar[tuple[str, ...]] = ("asked",)

    ask: Callable[[Observation], Any] = lambda _: None

    def observe(self, observation: Observation) -> None:
        self.ask(observation)

    def score(self, observation: Observation) -> torch.Tensor:
        return observation.positions.float()


@dataclass(frozen=True)
class Declaring(Asking):
    """The same, with query rows."""

    needs_queries: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda seen: seen.read_token_ids(), "token ids are not at hand: the policy must set needs_token_ids = True"),
        (
            lambda seen: seen.attention_mass(1),
            "attention_mass needs query rows: the policy must set needs_queries = True",
        ),
        (
            lambda seen: seen.recent_scores(seen.positions >= 0),
            "recent_scores needs the last queries: the policy must set recent_queries",
        ),
    ],
)
@torch.no_grad()
def test_what_was_not_declared_is_named(ask: Callable[[Observation], Any], message: str) -> None:
    """Under a stock attention, which hands over nothing but new keys and values."""
    model, ids = tiny_model(), random_tokens(1, 24)
    cache = PolicyCache.from_config(model.config, Asking(budget=8, ask=ask))
    with pytest.raises(ValueError, match=message):
        model(ids, past_key_values=cache)


@torch.no_grad()
def test_what_was_declared_is_at_hand() -> None:
    model, ids, shapes = tiny_model(), random_tokens(1, 24), []

    def ask(seen: Observation) -> None:
        shapes.append((tuple(seen.read_keys().shape), tuple(seen.attention_mass(4).shape)))

    cache = PolicyCache(model, Declaring(budget=8, ask=ask))
    model(ids, past_key_values=cache)
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    expected = ((1, config.num_key_value_heads, 24, size), (1, config.num_attention_heads, 24))
    assert shapes == [expected] * config.num_hidden_layers and cache.kept_positions(0).shape[-1] == 8
