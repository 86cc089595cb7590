"""The longest context that fits in so many bytes, from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kvpress.assembly import Policies
from kvpress.choice import choose_policies
from kvpress.profiling.candidates import Candidate
from kvpress.profiling.predict import policy_bytes, stock_bytes
from kvpress.profiling.shape import ModelShape

LEAST_TOKENS = 768  # shorter forwards take as much: 2.1 times what is live at once at 512 tokens, same model
SLACK = 1.75  # allocators keep freed blocks: 1.5 to 1.7 times what is live at once, SmolLM2, 2,048 tokens, CPU
LONGEST = 1 << 30  # tokens looked for at most, where the model names no window


@dataclass(frozen=True)
class Room:
    """What memory there is, and what besides the cache takes of it.

    Attributes:
        memory: bytes in all.
        new_tokens: generated after the prompt, at least 1.
        batch: rows.
        chunk_size: tokens of one forward of the prompt, `None` for all.
        weights: bytes, `None` for a dense model of the configuration's type.
        activations: bytes of the allowance, `None` for `activation_bytes`.
    """

    memory: int
    new_tokens: int = 256
    batch: int = 1
    chunk_size: int | None = None
    weights: int | None = None
    activations: int | None = None


@dataclass(frozen=True)
class Fit:
    """What fits with one candidate.

    Attributes:
        label: of the candidate.
        context: tokens of the longest prompt, of each row; 0 where none fits.
        bound_by: `"memory"`, the model's `"window"`, or `"search"` where neither is met below 2^30 tokens.
        kv_bytes: the cache after that prompt and the new tokens; exact but for heads that share a budget by need.
        weights_bytes, activation_bytes: the rest of it.
        total_bytes: the sum.
    """

    label: str
    context: int
    bound_by: str
    kv_bytes: int
    weights_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.weights_bytes + self.activation_bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def fit(shape: ModelShape, candidate: Candidate, room: Room) -> Fit:
    """The longest prompt with which `candidate` stays within `room`.

    Raises:
        ValueError: a policy whose memory follows the text, or a budget that it refuses.
    """
    weights = shape.weights_bytes if room.weights is None else room.weights
    window = None if shape.window is None or _reindexes(candidate) else shape.window - room.new_tokens

    def parts(context: int) -> tuple[int, int]:
        return kv_bytes(shape, candidate, context, room), working_bytes(shape, context, room)

    def fits(context: int) -> bool:
        return weights + sum(parts(context)) <= room.memory

    shortest, longest = shortest_context(candidate), LONGEST if window is None else window
    context = largest(fits, shortest, longest)
    bound = "memory" if context < longest else "search" if window is None else "window"
    cache, working = parts(context or shortest)
    return Fit(candidate.label, context, bound, cache, weights, working)


def kv_bytes(shape: ModelShape, candidate: Candidate, context: int, room: Room) -> int:
    """Bytes of the cache at the end."""
    policy, decoded = candidate.policy(context), room.new_tokens - 1
    if policy is None:
        return stock_bytes(shape, context, decoded, room.batch)
    policies: Policies = choose_policies(policy, {})
    return policy_bytes(shape, policies, context, decoded, room.batch, candidate.kv_dtype)


def working_bytes(shape: ModelShape, context: int, room: Room) -> int:
    """What a forward of the prompt takes besides: the allowance for activations."""
    if room.activations is not None:
        return room.activations
    return activation_bytes(shape, min(context, room.chunk_size or context) * room.batch)


def activation_bytes(shape: ModelShape, tokens: int) -> int:
    """An allowance, not a measurement: what `tokens` tokens take inside one layer at once, and the logits of a row.

    Of each token four vectors of the residual stream, three of the feed-forward part, two of the queries, and the layer's keys and values
    twice: as they come, and before they are rotated. All that 1.75 times, since allocators keep what was freed, and never less than
    for 768 tokens, since short prompts set aside as much. Attention that builds its weights (`eager`) needs far more.
    """
    widest = max((layer.token_bytes(1) for layer in shape.layers), default=0)
    numbers = 4 * shape.hidden + 3 * shape.intermediate + 2 * shape.query_heads * shape.query_dim + 2 * widest
    return int(SLACK * (max(tokens, LEAST_TOKENS) * numbers + 2 * shape.vocabulary) * shape.dtype.itemsize)


def shortest_context(candidate: Candidate) -> int:
    """The smallest power of two at which the policy takes its budget, where that is a share of the prompt.

    Raises:
        ValueError: it takes it nowhere.
    """
    for power in range(LONGEST.bit_length()):
        try:
            candidate.policy(1 << power)
            return 1 << power
        except ValueError:
            continue
    candidate.policy(LONGEST)
    return LONGEST


def largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number in `least` … `most` that fits, 0 for none; `fits` must be true up to some number and false from there."""
    if most < least or not fits(least):
        return 0
    low, high = least, 2 * least  # low fits
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _reindexes(candidate: Candidate) -> bool:
    """Whether positions stay small however long the text is."""
    policy: Any = candidate.policy(LONGEST)
    return bool(getattr(policy, "reindexes", False))
