"""Texts that end with the right answer to a question about a fact in them."""

import re

import pytest
import torch

from kvpress.demo.recall import recall_texts
from kvpress.testing.tiny_checkpoint import tiny_tokenizer

FACT = re.compile(r"The special number of the ([\w ]+) is (\d{7})\.")


def test_every_text_ends_with_what_its_fact_says():
    tokenizer = tiny_tokenizer()
    ids = recall_texts(tokenizer, 1500, count=3)
    assert ids.dtype == torch.int64 and ids.shape[0] == 3 and 1200 < ids.shape[1] <= 1500
    depths = []
    for row in ids:
        text = tokenizer.decode(row)
        fact, question = FACT.findall(text)  # the same words twice
        assert fact == question and text.endswith(f"is {fact[1]}.")
        depths.append(text.index(f"is {fact[1]}.") / len(text))
    assert depths == sorted(depths) and depths[0] < 0.3 and 0.6 < depths[-1] < 0.95
    assert len({FACT.findall(tokenizer.decode(row))[0] for row in ids}) == 3
    assert torch.equal(ids, recall_texts(tokenizer, 1500, count=3))
    others = [tokenizer.decode(row) for row in recall_texts(tokenizer, 1500, count=3, seed=1)]
    assert {FACT.findall(text)[0] for text in others}.isdisjoint(FACT.findall(tokenizer.decode(row))[0] for row in ids)


def test_the_first_token_of_every_text_stays():
    class Marked:
        """A tokenizer that begins every text with a token of its own."""

        tokenizer = tiny_tokenizer()

        def __call__(self, text, add_special_tokens=True):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [90_000] * add_special_tokens + ids}

    ids = recall_texts(Marked(), 1500, count=3)
    assert ids[:, 0].tolist() == [90_000] * 3
    assert int((ids == 90_000).sum()) == 3


@pytest.mark.parametrize(
    ("tokens", "count", "message"), [(40, 2, "tokens must leave room"), (1500, 0, "count must be at least 1, not 0")]
)
def test_impossible_texts_are_refused(tokens, count, message):
    with pytest.raises(ValueError, match=message):
        recall_texts(tiny_tokenizer(), tokens, count)
