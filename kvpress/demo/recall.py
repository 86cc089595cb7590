"""Texts that end with a question and its right answer: what a model must find again far back, for calibration."""

import random
from itertools import islice
from typing import Any

from torch import Tensor

from kvpress.demo.passkey import largest_fitting, paragraphs
from kvpress.demo.prose import PLACES, sentences

FACT = "The special number of the {place} is {number}."
QUESTION = "\nWhat is the special number of the {place}? The special number of the {place} is"


def recall_texts(tokenizer: Any, tokens: int = 1024, count: int = 4, *, seed: int = 0) -> Tensor:
    """Generated prose with a number of seven digits in it, each text with another at another depth, asked for and answered at the end.

    Args:
        tokenizer: the model's tokenizer.
        tokens: length wanted; reached to within some sentences, never exceeded.
        count: texts.
        seed: chooses prose, places and numbers.

    Returns:
        Token ids `[count, at most tokens]` int64, no padding; the last tokens are the answer and a full stop.

    Raises:
        ValueError: count below 1, or tokens that leave no room for prose.
    """
    import torch

    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    texts = [_text(tokenizer, tokens, seed * count + number, (number + 0.5) / count) for number in range(count)]
    shortest = min(map(len, texts))
    # the first token stays: many models attend to it as a rest
    return torch.tensor([ids[:1] + ids[len(ids) - shortest + 1 :] for ids in texts])


def _text(tokenizer: Any, tokens: int, seed: int, depth: float) -> list[int]:
    """Token ids of one text, at most `tokens`."""
    generator = random.Random(f"recall {seed}")
    place, number = generator.choice(PLACES), generator.randrange(1_000_000, 10_000_000)
    ending = QUESTION.format(place=place) + f" {number}."

    def ids_of(amount: int) -> list[int]:
        told = list(islice(sentences(seed), amount))
        told.insert(round(depth * amount), FACT.format(place=place, number=number))
        ids: list[int] = tokenizer(paragraphs(told))["input_ids"]
        ids += tokenizer(ending, add_special_tokens=False)["input_ids"]
        return ids

    amount = largest_fitting(lambda amount: len(ids_of(amount)), tokens)
    if amount < 1:
        raise ValueError(f"tokens must leave room for a fact, its question and a sentence, {tokens} do not")
    return ids_of(amount)
