"""SepLLM: the first tokens, the separators, and the last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from kvpress.policies.base import EvictionPolicy, check_choice, check_integer
from kvpress.policies.budget import Budgets
from kvpress.policies.separators import separator_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpress.observation import Observation


@dataclass(frozen=True)
class SepLLM(EvictionPolicy):
    """Keeps the first tokens, the last tokens, and separators: punctuation and white space, which sum up what precedes.

    Chen et al., "SepLLM: Accelerate Large Language Models by Compressing One Segment into One Separator", arXiv
    2412.12094. The choice needs no scores and is the same in every layer and head; each row of a batch has its own. A
    head fills up to `capacity` tokens. The next one triggers a cut to the first `initial` tokens, the last `window`,
    and of what lies between only separators, the latest `separators` of them. A prompt is attended to in full, then
    cut by the same rule.

    Args:
        initial: first tokens that are never evicted.
        separators: most separators kept between the first and the last tokens. `None` is the unbounded form: all of
            them stay, and `capacity` counts what is held beside those between the first and the last tokens.
        window: last tokens that are never evicted.
        capacity: tokens held at most, larger than `initial + separators + window`.
        token_ids: the ids of separators, as `separator_ids(tokenizer)` finds them. `None`: of the tokenizer that lies
            beside the model's weights. An empty tuple leaves StreamingLLM.
        positions: `"keep"`: original ones; `"reindex"`: attention runs over positions 0 … n-1 of what is kept, for
            texts beyond the trained length.
    """

    name: ClassVar[str] = "sepllm"
    summary: ClassVar[str] = "the first tokens, separators, and the last tokens"
    paper: ClassVar[str] = "arXiv 2412.12094"
    fails: ClassVar[str] = (
        "text with little punctuation (code, JSON, tables); facts that their separator did not take up"
    )
    needs: ClassVar[str] = "token ids"
    needs_token_ids: ClassVar[bool] = True
    same_for_all_heads: ClassVar[bool] = True
    same_in_all_layers: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("token_id",)  # fp32 holds every id below 2^24

    budget: Budgets | None = field(default=None, init=False)
    interval: int = field(default=1, init=False)
    initial: int = 4
    separators: int | None = 64
    window: int = 256
    capacity: int = 800
    token_ids: tuple[int, ...] | None = None
    positions: str = "keep"

    def __post_init__(self) -> None:
        check_integer(self.name, "initial", self.initial, 0)
        check_integer(self.name, "window", self.window, 1)
        check_integer(self.name, "capacity", self.capacity, 1)
        if self.separators is not None:
            check_integer(self.name, "separators", self.separators, 0)
        check_choice(self.name, "positions", self.positions, ["keep", "reindex"])
        for token_id in self.token_ids or ():
            check_integer(self.name, "token_ids", token_id, 0)
        kept = self.initial + (self.separators or 0) + self.window
        if self.capacity <= kept:
            raise ValueError(
                f"capacity of {self.name} must be larger than {kept} (initial={self.initial} + "
                f"separators={self.separators} + window={self.window}), got {self.capacity}"
            )
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", tuple(self.token_ids))
        object.__setattr__(self, "budget", kept)
        object.__setattr__(self, "interval", self.capacity - kept + 1)
        super().__post_init__()

    def for_model(self, model: PreTrainedModel) -> Self:
        """With the separators of the tokenizer that lies beside the model's weights, where none are given.

        Raises:
            ValueError: no tokenizer there.
        """
        if self.token_ids is not None:
            return self
        try:
            token_ids = _checkpoint_separators(model.name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"token_ids of {self.name} must be given, as separator_ids(tokenizer): "
                f"no tokenizer lies beside the model's weights at {model.name_or_path!r}"
            ) from error
        return replace(self, token_ids=token_ids)

    @property
    def reindexes(self) -> bool:
        return self.positions == "reindex"

    @property
    def recounts(self) -> bool:  # type: ignore[override]
        """The unbounded form keeps as many tokens as there are separators."""
        return self.separators is None

    @property
    def protected_sinks(self) -> int:
        return self.initial

    def protected_window(self, budget: int) -> int:
        return self.window

    def observe(self, observation: Observation) -> None:
        observation.set_new("token_id", observation.read_token_ids()[:, None].float())

    def score(self, observation: Observation) -> Tensor:
        return observation.positions[:, :1].float()

    def discards(self, observation: Observation) -> Tensor:
        return ~self._separators(observation)

    def allocate(self, observation: Observation, budgets: Sequence[int]) -> Sequence[int]:
        if self.separators is not None:
            return budgets
        positions = observation.positions[:, :1]
        between = (positions >= self.initial) & ~observation.in_window(self.window)[:, :1]
        found = (self._separators(observation) & between).sum(dim=(1, 2)).tolist()
        return [budget + count for budget, count in zip(budgets, found, strict=True)]

    def _separators(self, observation: Observation) -> Tensor:
        """`[batch, 1, slots]` bool; all heads hold the same tokens."""
        ids = observation.columns["token_id"][:, :1]
        return torch.isin(ids, torch.tensor(self.token_ids, dtype=ids.dtype, device=ids.device))


@lru_cache(maxsize=8)
def _checkpoint_separators(name_or_path: str) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    if not name_or_path:
        raise ValueError("the model was not loaded from a checkpoint")
    tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    return separator_ids(tokenizer)
