"""Scorers written for another library, as eviction policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor

from kvpress.errors import KVPressError
from kvpress.policies.base import EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvpress.observation import Observation


class UnsupportedPressError(KVPressError, TypeError):
    """A scorer that asks for what an eviction policy is not shown."""


@dataclass(frozen=True)
class PressPolicy(EvictionPolicy):
    """Keeps the tokens to which an object gives the highest scores: `press.score(module, hidden_states, keys, values, attentions, kwargs)`.

    That is the interface of `ScorerPress` in NVIDIA's kvpress. For presses that look at keys and values only, such as those of key norms,
    key differences or lags. A policy sees neither hidden states nor the attention module (of which `layer_idx` is there) nor the call's
    arguments; `attentions` is `None`. A press that touches them is refused with `UnsupportedPressError` at the first eviction.

    The press is asked whenever something must go, about what is held then: after the prompt, after later turns, and while decoding
    (`interval` makes that rarer). It is given the tokens of one batch row at a time, in the order of their positions, without padding:
    `keys` and `values [1, kv_heads, tokens, dim]`, keys as the model rotated them; it returns `[1, kv_heads, tokens]`. Its own
    `compression_ratio` says nothing here: the budget does. It must keep no state from call to call.

    Not registered: it cannot be made from a name, nor saved with a cache.

    Args:
        budget: tokens kept per KV head; not one a head.
        press: the object.

    Raises:
        TypeError: an object without a `score`.
    """

    name: ClassVar[str] = "press"
    summary: ClassVar[str] = "what an object's `score` prefers"
    paper: ClassVar[str] = "none: an adapter"
    needs: ClassVar[str] = "keys and values"
    needs_values: ClassVar[bool] = True

    press: Any = None

    def __post_init__(self) -> None:
        if not callable(getattr(self.press, "score", None)):
            raise TypeError(
                "press must have a method score(module, hidden_states, keys, values, attentions, kwargs), "
                f"got {type(self.press).__name__}"
            )
        super().__post_init__()
        if self.budgets_by_head:
            raise ValueError(
                f"budget of press must be one for all heads of a layer, got {self.budget!r}: it scores them at once"
            )

    def to_dict(self) -> dict[str, Any]:
        """For reports: the press is named by its class."""
        return {"name": self.name, "budget": self.budget, "interval": self.interval, "press": type(self.press).__name__}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A press is an object: no dictionary gives it back.

        Raises:
            ValueError: always.
        """
        raise ValueError("a policy made from a press cannot be made from a dictionary: pass PressPolicy(budget, press)")

    def score(self, observation: Observation) -> Tensor:
        values, positions = observation.values, observation.positions
        keys = None if observation.keys is None else observation.read_keys()
        if keys is None or values is None or keys.dim() != 4 or keys.shape[1] != positions.shape[1]:
            raise UnsupportedPressError(
                "a press needs the keys of the cache's own heads, this model makes other keys of the cached ones"
            )
        scores = torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)
        for row in range(positions.shape[0]):
            tokens = int((positions[row, 0] >= 0).sum())
            order = positions[row].argsort(dim=-1)[:, positions.shape[-1] - tokens :]  # empty slots lie before
            index = order[..., None]
            given = (keys[row].take_along_dim(index, dim=1)[None], values[row].take_along_dim(index, dim=1)[None])
            found = self._ask(observation.layer, *given)
            scores[row].scatter_(-1, order, found[0].float())
        return scores

    def _ask(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """Scores `[1, kv_heads, tokens]` of one row's tokens."""
        name = type(self.press).__name__
        found = self.press.score(
            _Module(name, layer), _Missing(name, "hidden_states"), keys, values, None, _Missing(name, "kwargs")
        )
        if not isinstance(found, Tensor) or found.shape != keys.shape[:3]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UnsupportedPressError(f"score of {name} must return {tuple(keys.shape[:3])}, got {shape}")
        return found


class _Missing:
    """Stands for what a policy does not see, and says so when it is touched."""

    def __init__(self, press: str, what: str) -> None:
        self.__dict__.update(_press=press, _what=what)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedPressError(
            f"{self._press} uses {self._what}, which an eviction policy is not shown: only presses of keys and values can be used"
        )

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        next(item for item in (*args, *(kwargs or {}).values()) if isinstance(item, cls))._refuse()

    __getitem__ = __iter__ = __len__ = __contains__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __rmatmul__ = __neg__ = (
        _refuse
    )


class _Module(_Missing):
    """The attention module: only its index is known."""

    def __init__(self, press: str, layer: int) -> None:
        super().__init__(press, "the attention module")
        self.__dict__["layer_idx"] = layer
