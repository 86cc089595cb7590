"""Output limit, metric and exceptions of LongBench's 21 tasks (`dataset2maxlen.json`, `eval.py`, `pred.py`)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskRule:
    """How a task is asked and scored.

    Attributes:
        max_new_tokens: limit of the answer, in tokens.
        metric: name in `kvpress.longbench.metrics.METRICS`.
        few_shot_ending: the last words of the task's input that start the answer; the solved examples end so too.
            Such tasks take no chat template, and of their answers only the first line is scored.
        chat: False where LongBench leaves the chat template away.
        stop_at_newline: the answer ends at the first newline, after at least one token.
    """

    max_new_tokens: int
    metric: str
    few_shot_ending: str = ""
    chat: bool = True
    stop_at_newline: bool = False


def _few_shot(limit: int, metric: str, ending: str, *, stop_at_newline: bool = False) -> TaskRule:
    return TaskRule(limit, metric, ending, chat=False, stop_at_newline=stop_at_newline)


TASKS: dict[str, TaskRule] = {
    "narrativeqa": TaskRule(128, "qa_f1"),
    "qasper": TaskRule(128, "qa_f1"),
    "multifieldqa_en": TaskRule(64, "qa_f1"),
    "multifieldqa_zh": TaskRule(64, "qa_f1_zh"),
    "hotpotqa": TaskRule(32, "qa_f1"),
    "2wikimqa": TaskRule(32, "qa_f1"),
    "musique": TaskRule(32, "qa_f1"),
    "dureader": TaskRule(128, "rouge_l_zh"),
    "gov_report": TaskRule(512, "rouge_l"),
    "qmsum": TaskRule(512, "rouge_l"),
    "multi_news": TaskRule(512, "rouge_l"),
    "vcsum": TaskRule(512, "rouge_l_zh"),
    "trec": _few_shot(64, "classification", "Type:"),
    "triviaqa": _few_shot(32, "qa_f1", "Answer:"),
    "samsum": _few_shot(128, "rouge_l", "Summary:", stop_at_newline=True),
    "lsht": _few_shot(64, "classification", "类别："),
    "passage_count": TaskRule(32, "count"),
    "passage_retrieval_en": TaskRule(32, "retrieval"),
    "passage_retrieval_zh": TaskRule(32, "retrieval_zh"),
    "lcc": TaskRule(64, "code_similarity", chat=False),
    "repobench-p": TaskRule(64, "code_similarity", chat=False),
}

EXTENDED_TASKS = (
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)


def length_bucket(length: float) -> str:
    """LongBench-E's bucket of a length in words (English, code) or characters (Chinese)."""
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"
