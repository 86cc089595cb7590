"""The needle grid: one fact at every depth of every length, for heat maps."""

from collections.abc import Sequence

from .prompt import PromptEncoder
from .ruler.haystack import Prose
from .ruler.niah import NeedleTask
from .ruler.suite import RulerData, TaskRule, fitted_samples, needle_generator
from .sample import Sample

RULE = TaskRule(32)
KINDS = ("essay", "noise")


def needle_samples(
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    encoder: PromptEncoder,
    *,
    haystack: str = "essay",
    seed: int = 42,
    data: RulerData = RulerData(),  # noqa: B008 - frozen
) -> list[Sample]:
    """`count` samples for each length (tokens, answer limit included) and depth (percent of the haystack).

    The needle is RULER's with a number as its value, in prose ("essay") or in lines of noise ("noise").

    Raises:
        ValueError: a depth outside 0 to 100, an unknown haystack, or a length that is too short.
    """
    if haystack not in KINDS:
        raise ValueError(f"haystack must be one of {list(KINDS)}, got {haystack!r}")
    samples: list[Sample] = []
    for length in lengths:
        prose = Prose(data.haystack, seed=seed)
        for depth in depths:
            if not 0 <= depth <= 100:
                raise ValueError(f"depth must lie between 0 and 100 percent, not {depth}")
            draw, increment = needle_generator(NeedleTask(haystack, depth=depth), length, prose)
            cell = f"{length}/{depth:g}%"
            samples += [
                _placed(sample, length, depth)
                for sample in fitted_samples(
                    f"needle/{depth:g}",
                    draw,
                    increment,
                    RULE,
                    length,
                    count,
                    encoder,
                    seed=seed,
                    groups=(cell, f"average/{length}"),
                )
            ]
    return samples


def _placed(sample: Sample, length: int, depth: float) -> Sample:
    details = {**sample.details, "cell": [length, depth]}
    return Sample(**{**vars(sample), "task": "needle", "details": details})
