"""Names of metrics, and the score of one prediction against its references."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .choice import choice_score
from .classification import classification_score
from .code import code_similarity
from .f1 import qa_f1, qa_f1_zh
from .numbers import count_score, retrieval_score, retrieval_zh_score
from .rouge import rouge_l, rouge_l_zh
from .string_match import string_match_all, string_match_part

# A metric of one prediction and one reference; classification also reads the classes of the sample.
PAIRWISE: dict[str, Callable[[str, str], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "retrieval": retrieval_score,
    "retrieval_zh": retrieval_zh_score,
    "count": count_score,
    "code_similarity": code_similarity,
    "choice": choice_score,
}
OVER_ALL: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}
METRICS = (*PAIRWISE, *OVER_ALL, "classification")


def score(metric: str, prediction: str, references: Sequence[str], details: Mapping[str, Any]) -> float:
    """Score of a prediction in [0, 1]: the best over the references, unless the metric reads them together.

    Args:
        details: the sample's details; `all_classes` for classification, `first_line` (bool) for the tasks
            of which LongBench scores the first non-empty line only.

    Raises:
        ValueError: unknown metric, or no reference.
    """
    if not references:
        raise ValueError("references must hold at least one answer")
    if details.get("first_line"):
        prediction = prediction.lstrip("\n").split("\n")[0]
    if metric in OVER_ALL:
        return OVER_ALL[metric](prediction, references)
    if metric == "classification":
        classes = details["all_classes"]
        return max(classification_score(prediction, reference, classes) for reference in references)
    if metric not in PAIRWISE:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    return max(PAIRWISE[metric](prediction, reference) for reference in references)
