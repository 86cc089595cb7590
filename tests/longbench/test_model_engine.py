"""A real (tiny, random) model: aware equals agnostic for the full cache, and sharing a context changes nothing."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from kvpress.longbench.ruler import ruler_samples
from kvpress.longbench.runner import FULL, Method, ModelEngine
from kvpress.longbench.sample import Sample


class CountingModel:
    """Counts the tokens that go through the model."""

    def __init__(self, model):
        self.tokens = 0
        self.handle = model.get_input_embeddings().register_forward_pre_hook(self.count)

    def count(self, module, arguments):
        self.tokens += arguments[0].numel()


@pytest.fixture
def counter(model):
    counted = CountingModel(model)
    yield counted
    counted.handle.remove()


class HeadDroppingCache(DynamicCache):
    """A deliberately lossy cache: its first forward keeps the last 8 positions visible only through their values."""

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if keys.shape[-2] > 8:
            values = torch.cat([torch.zeros_like(values[..., :-8, :]), values[..., -8:, :]], dim=-2)
        return super().update(keys, values, layer_idx, *args, **kwargs)


def questions(count):
    return [
        Sample("t", f"s{i}", "The same long context. " * 8, f" Question {i}?", " Answer:", ("x",), "qa_f1", 6)
        for i in range(count)
    ]


def encoded(encoder, samples):
    return [(sample, encoder.encode(sample)) for sample in samples]


def test_full_cache_answers_the_same_aware_or_not(model, tokenizer, encoder):
    batch = encoded(encoder, ruler_samples("niah_single_1", 700, 1, encoder))
    aware, agnostic, chunked = (
        list(ModelEngine(model, tokenizer, **options).answers(FULL, batch))
        for options in ({"query_aware": True}, {}, {"chunk_size": 64})
    )
    assert aware[0].prediction == agnostic[0].prediction == chunked[0].prediction != ""
    assert aware[0].new_tokens == agnostic[0].new_tokens > 0
    assert aware[0].cache_bytes == agnostic[0].cache_bytes > 0


def test_shared_context_is_prefilled_once_and_stays_clean(model, tokenizer, encoder, counter):
    samples = questions(3)
    batch = encoded(encoder, samples)
    engine = ModelEngine(model, tokenizer)
    together = list(engine.answers(FULL, batch))
    shared_tokens, counter.tokens = counter.tokens, 0
    apart = [answer for pair in batch for answer in engine.answers(FULL, [pair])]
    context = len(batch[0][1].context_ids)
    assert counter.tokens - shared_tokens == 2 * context > 100
    assert [answer.prediction for answer in together] == [answer.prediction for answer in apart]
    assert len({answer.prediction for answer in together}) > 1


def test_aware_prefills_for_every_question(model, tokenizer, encoder, counter):
    batch = encoded(encoder, questions(2))
    list(ModelEngine(model, tokenizer, query_aware=True).answers(FULL, batch))
    assert counter.tokens >= sum(len(prompt) for _, prompt in batch)


def test_the_cache_under_test_is_the_one_that_answers(model, tokenizer, encoder):
    made = []

    def factory(model):
        made.append(HeadDroppingCache(config=model.config))
        return made[-1]

    lossy = Method("lossy", factory=factory)
    batch = encoded(encoder, questions(2))
    for query_aware, caches in ((False, 1), (True, 2)):
        made.clear()
        engine = ModelEngine(model, tokenizer, query_aware=query_aware)
        answers = list(engine.answers(lossy, batch))
        assert len(made) == caches
        full = list(engine.answers(FULL, batch))
        assert [answer.prediction for answer in answers] != [answer.prediction for answer in full]


def test_newline_ends_an_answer_after_one_token(model, tokenizer, encoder):
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]

    def prefer_newline(module, arguments, logits):
        logits[..., newline] += 1000
        return logits

    handle = model.lm_head.register_forward_hook(prefer_newline)
    try:
        found = {}
        for stop in (False, True):
            sample = replace(questions(1)[0], stop_at_newline=stop)
            (answer,) = ModelEngine(model, tokenizer).answers(FULL, encoded(encoder, [sample]))
            found[stop] = answer.prediction, answer.new_tokens
    finally:
        handle.remove()
    assert found[False] == ("\n" * 6, 6)
    # The first token must be another one; the second is the newline that ends the answer.
    assert found[True][1] == 2 and found[True][0].endswith("\n") and found[True][0] != "\n\n"


def test_bad_chunk_size(model, tokenizer):
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        ModelEngine(model, tokenizer, chunk_size=0)
