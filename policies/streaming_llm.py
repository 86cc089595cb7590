"""StreamingLLM: the first tokens and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from kvpress.policies.base import EvictionPolicy, check_choice, check_integer
from kvpress.policies.token_rule import TokenRule

if TYPE_CHECKING:
    from kvpress.observation import Observation


@dataclass(frozen=True)
class StreamingLLM(EvictionPolicy):
    """Keeps the first `sinks` tokens, which attract much attention whatever they are, and the last `budget - sinks`.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.

    Args:
        budget: tokens kept per KV head, sinks included.
        sinks: first tokens that are never evicted.
        positions: `"keep"`: original ones; `"reindex"`: attention runs over positions 0 … n-1 of what is kept, as in the paper, which
            serves texts beyond the trained length. A prompt in one forward is attended to before anything is evicted: feed one that
            exceeds the trained length in chunks.
    """

    name: ClassVar[str] = "streaming_llm"
    summary: ClassVar[str] = "the first tokens and the last ones"
    paper: ClassVar[str] = "arXiv 2309.17453"
    fails: ClassVar[str] = "anything asked about the middle: it is gone"
    same_for_all_heads: ClassVar[bool] = True
    same_in_all_layers: ClassVar[bool] = True

    sinks: int = 4
    positions: str = "keep"

    def __post_init__(self) -> None:
        check_choice(self.name, "positions", self.positions, ["keep", "reindex"])
        check_integer(self.name, "sinks", self.sinks, 0)
        super().__post_init__()

    @property
    def reindexes(self) -> bool:
        return self.positions == "reindex"

    @property
    def protected_sinks(self) -> int:
        return self.sinks

    @property
    def token_rule(self) -> TokenRule:
        return TokenRule(None)

    def score(self, observation: Observation) -> Tensor:
        return observation.positions.float()
