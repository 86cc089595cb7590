"""LongBench version 1 and E: from rows of the official files to samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..prompt import PromptEncoder
from ..sample import Sample, Skipped
from .prompts import PromptTemplate, load_prompts
from .registry import EXTENDED_TASKS, TASKS, TaskRule, length_bucket
from .rows import problem
from .source import Source

_FIELDS: dict[str, type | tuple[type, ...]] = {"input": str, "context": str, "answers": list, "length": (int, float)}


def longbench_samples(
    source: Source,
    tasks: Sequence[str],
    encoder: PromptEncoder,
    *,
    max_length: int,
    extended: bool = False,
    limit: int | None = None,
    prompts: Path | None = None,
) -> tuple[list[Sample], list[Skipped]]:
    """Samples of `tasks` in file order, prompts cut in the middle to `max_length` tokens, and the rows left out.

    Args:
        max_length: limit of the bare prompt in tokens, before any chat template.
        extended: read LongBench-E's files (`<task>_e.jsonl`) and average by length bucket too.
        limit: samples of each task, counted from the start of its file.

    Raises:
        ValueError: a task that this benchmark does not have.
        DataError: the prompt file or the archive cannot be used.
    """
    known = EXTENDED_TASKS if extended else tuple(TASKS)
    for task in tasks:
        if task not in known:
            raise ValueError(f"task must be one of {', '.join(known)}, not {task!r}")
    templates = load_prompts(prompts)
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for task in tasks:
        found = 0
        for row in source.rows(f"{task}_e" if extended else task):
            if found == limit:
                break
            made = row if isinstance(row, Skipped) else _sample(source, task, *row, templates[task], extended)
            if isinstance(made, Skipped):
                skipped.append(made)
            else:
                samples.append(encoder.truncate_middle(made, max_length))
                found += 1
    return samples, skipped


def _sample(
    source: Source, task: str, line: int, row: dict[str, Any], template: PromptTemplate, extended: bool
) -> Sample | Skipped:
    rule = TASKS[task]
    name = f"{task}_e" if extended else task
    wrong = problem(row, _FIELDS) or _wrong_answers(row, rule)
    if wrong:
        return Skipped(str(source.path / f"{name}.jsonl"), line, wrong)
    values = {"context": row["context"], "input": row["input"]}
    question, answer_prefix = template.question.format(**values), template.answer_prefix.format(**values)
    ending = rule.few_shot_ending
    if ending and not answer_prefix and question.endswith(ending):
        question, answer_prefix = question.removesuffix(ending), ending
    bucket = (f"{task}/{length_bucket(row['length'])}",) if extended else ()
    details = {
        "line": line,
        "id": row.get("_id"),
        "length": row["length"],
        **({"first_line": True} if ending else {}),
        **({"all_classes": row["all_classes"]} if rule.metric == "classification" else {}),
    }
    return Sample(
        task,
        f"longbench/{name}/{line}",
        template.context.format(**values),
        question,
        answer_prefix,
        tuple(row["answers"]),
        rule.metric,
        rule.max_new_tokens,
        (task, *bucket, "average"),
        details,
        chat=rule.chat,
        stop_at_newline=rule.stop_at_newline,
    )


def _wrong_answers(row: dict[str, Any], rule: TaskRule) -> str | None:
    answers = row["answers"]
    if not answers or not all(isinstance(answer, str) for answer in answers) or not any(answers):
        return "the field 'answers' must hold at least one text that is not empty"
    classes = row.get("all_classes")
    if rule.metric == "classification" and not (isinstance(classes, list) and classes):
        return "the field 'all_classes' must hold the classes of this task"
    patterns = {"retrieval": "Paragraph ", "retrieval_zh": "段落"}
    if rule.metric in patterns and not all(patterns[rule.metric] in answer for answer in answers):
        return f"the field 'answers' must read {patterns[rule.metric]!r} and a number"
    return None
