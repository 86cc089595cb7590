"""The pass-key prompt: its length, its needle, its prose, its grading."""

import re

import pytest
import torch

from kvpress.demo.passkey import QUESTION, largest_fitting, make_task
from kvpress.demo.prose import sentences
from kvpress.testing.tiny_checkpoint import tiny_tokenizer


@pytest.mark.parametrize("tokens", [400, 1000, 3001])
def test_the_prompt_is_nearly_as_long_as_asked_and_never_longer(tokens: int) -> None:
    task = make_task(tiny_tokenizer(), tokens)
    assert tokens - 250 < task.prompt_ids.shape[1] <= tokens  # a sentence is shorter than 250 bytes
    assert task.prompt_ids.shape[0] == 1
    assert task.prompt_ids.dtype == torch.int64


def test_the_prompt_is_the_context_and_then_the_question() -> None:
    tokenizer = tiny_tokenizer()
    task = make_task(tokenizer, 800)
    length = task.context_ids.shape[1]
    assert torch.equal(task.prompt_ids[:, :length], task.context_ids)
    assert tokenizer.decode(task.prompt_ids[0, length:]) == QUESTION
    assert tokenizer.decode(task.context_ids[0]) == task.context


def test_the_key_is_five_digits_and_stands_twice_in_one_sentence() -> None:
    task = make_task(tiny_tokenizer(), 1500, seed=3)
    assert re.fullmatch(r"[1-9]\d{4}", task.key)
    assert re.findall(r"\d+", task.context) == [task.key, task.key]
    assert f"The pass key is {task.key}. Remember it. {task.key} is the pass key." in task.context


@pytest.mark.parametrize(("depth", "low", "high"), [(0.0, 0.0, 0.0), (0.5, 0.4, 0.6), (1.0, 0.95, 1.0)])
def test_depth_places_the_key(depth: float, low: float, high: float) -> None:
    context = make_task(tiny_tokenizer(), 6000, depth=depth).context
    assert low <= context.index("The pass key is") / len(context) <= high


def test_the_seed_decides_key_and_prose() -> None:
    tokenizer = tiny_tokenizer()
    first, same, other = (make_task(tokenizer, 900, seed=seed) for seed in (1, 1, 2))
    assert (first.key, first.context) == (same.key, same.context)
    assert first.key != other.key
    assert first.context != other.context


def test_the_prose_never_repeats_a_sentence() -> None:
    stream = sentences(0)
    told = [next(stream) for _ in range(2000)]
    assert len(set(told)) == len(told)
    assert all(re.fullmatch(r"[A-Z][^{}\d]*\.", sentence) for sentence in told)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" {key}. Remember it.", True),
        ("{key}", True),
        (" 1{key}", False),
        (" 12 {key}", False),
        (" lost", False),
        ("", False),
    ],
)
def test_the_first_number_is_graded(answer: str, right: bool) -> None:
    task = make_task(tiny_tokenizer(), 600)
    assert task.is_right(answer.format(key=task.key)) is right


@pytest.mark.parametrize(
    ("tokens", "depth", "message"), [(50, 0.5, "tokens must leave room"), (500, 1.5, "depth must lie")]
)
def test_bad_values_are_refused(tokens: int, depth: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(tiny_tokenizer(), tokens, depth=depth)


def test_largest_fitting_is_exact() -> None:
    for limit in range(0, 40):
        assert largest_fitting(lambda n: 3 * n + 2, limit) == max(0, (limit - 2) // 3)
