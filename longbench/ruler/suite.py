"""All 13 tasks: output limits, scoring, and the length rule applied to each task's generator."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..prompt import PromptEncoder
from ..sample import Sample
from .common_words import draw_common_words
from .documents import DocumentSet, read_hotpotqa, read_squad
from .draft import Draft, Draw
from .frequent_words import draw_frequent_words
from .haystack import Prose
from .length import largest_fitting, shrink
from .niah import NIAH_TASKS, NeedleTask
from .question_answering import draw_question
from .synthetic_documents import synthetic_documents
from .variable_tracking import VariableTracking


@dataclass(frozen=True)
class TaskRule:
    """Output limit in tokens and metric of a task."""

    max_new_tokens: int
    metric: str = "string_match_all"


TASKS: dict[str, TaskRule] = {
    **{name: TaskRule(128) for name in NIAH_TASKS},
    "vt": TaskRule(30),
    "cwe": TaskRule(120),
    "fwe": TaskRule(50),
    "qa_1": TaskRule(32, "string_match_part"),
    "qa_2": TaskRule(32, "string_match_part"),
}


@dataclass(frozen=True)
class RulerData:
    """Files that replace generated text: a haystack, SQuAD 2.0 and HotpotQA in their official JSON."""

    haystack: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None


def ruler_samples(
    task: str,
    max_length: int,
    count: int,
    encoder: PromptEncoder,
    *,
    seed: int = 42,
    data: RulerData = RulerData(),
) -> list[Sample]:
    """Draw `count` samples of `task` whose prompt and output limit fit in `max_length` tokens.

    Sample i depends on the settings and on i alone, not on how many samples are drawn.

    Raises:
        ValueError: unknown task, a count below 1, or a length in which the smallest sample does not fit.
        DataError: a data file cannot be used.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    rule = TASKS[task]
    draw, increment = _generator(task, max_length, count, encoder, seed, data)
    return fitted_samples(
        f"ruler/{task}",
        draw,
        increment,
        rule,
        max_length,
        count,
        encoder,
        seed=seed,
        groups=(f"{task}/{max_length}", f"average/{max_length}"),
    )


def fitted_samples(
    name: str,
    draw: Draw,
    increment: int,
    rule: TaskRule,
    max_length: int,
    count: int,
    encoder: PromptEncoder,
    *,
    seed: int,
    groups: tuple[str, ...],
) -> list[Sample]:
    """Apply the length rule: one haystack size for all samples, lowered by an increment where one is too long."""
    task = name.rpartition("/")[2]

    def sample(units: int, index: int, attempt: int = 0) -> Sample:
        draft = draw(units, index, Random(f"{name}/{max_length}/{seed}/{index}/{attempt}"))
        sample_id = f"{name}/{max_length}/{seed}/{index}"
        return _sample(task, sample_id, draft, rule, groups, {"length": max_length, "index": index, "units": units})

    def fits(candidate: Sample) -> bool:
        return encoder.length(candidate) + rule.max_new_tokens <= max_length

    size = largest_fitting(lambda units: fits(sample(units, 0)))
    result = []
    for index in range(count):
        units, attempt = size, 0
        candidate = sample(units, index)
        while units and not fits(candidate):
            units, attempt = shrink(units, increment), attempt + 1
            candidate = sample(units, index, attempt)
        if not units:
            raise ValueError(
                f"length: {task} does not fit in {max_length} tokens ({encoder.length(candidate)} prompt tokens "
                f"at the smallest size, {rule.max_new_tokens} output tokens)"
            )
        result.append(candidate)
    return result


def _sample(
    task: str, sample_id: str, draft: Draft, rule: TaskRule, groups: tuple[str, ...], details: dict[str, object]
) -> Sample:
    return Sample(
        task,
        sample_id,
        draft.context,
        draft.question,
        draft.answer_prefix,
        draft.answers,
        rule.metric,
        rule.max_new_tokens,
        groups,
        {**details, **draft.details},
    )


def _generator(
    task: str, max_length: int, count: int, encoder: PromptEncoder, seed: int, data: RulerData
) -> tuple[Draw, int]:
    small = max_length < 4096
    if task in NIAH_TASKS:
        return needle_generator(NIAH_TASKS[task], max_length, Prose(data.haystack, seed=seed))
    if task == "vt":
        tracking = VariableTracking(lambda text: len(encoder.tokenizer(text, verbose=False)["input_ids"]), seed)
        return lambda units, index, rng: tracking.draw(units, rng), 5 if small else 10
    if task == "cwe":
        return lambda units, index, rng: draw_common_words(units, rng, max_length=max_length, seed=seed), 10
    if task == "fwe":
        room = max_length - TASKS[task].max_new_tokens
        return lambda units, index, rng: draw_frequent_words(units, rng, prompt_tokens=room, seed=seed), room // 32
    documents = _documents(task, count, seed, data)
    return lambda units, index, rng: draw_question(units, index, rng, documents, seed=seed), 1 if small else 10


def needle_generator(task: NeedleTask, max_length: int, prose: Prose) -> tuple[Draw, int]:
    """The generator of a needle task and its increment: 500 words of prose, or 25 lines.

    Below 4096 tokens, where RULER has no prose tasks, 500 words would be most of the text: 25 words, or 5 lines.
    """
    small = max_length < 4096
    increment = (25 if small else 500) if task.haystack == "essay" else (5 if small else 25)
    return lambda units, index, rng: task.draw(units, rng, prose), increment


def _documents(task: str, count: int, seed: int, data: RulerData) -> DocumentSet:
    if task == "qa_1" and data.squad is not None:
        return read_squad(data.squad)
    if task == "qa_2" and data.hotpotqa is not None:
        return read_hotpotqa(data.hotpotqa)
    return synthetic_documents(max(count, 400), seed=seed, hops=1 if task == "qa_1" else 2)
