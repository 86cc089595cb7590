"""SepLLM: first tokens, separators, last tokens; bounded and unbounded; endless streams."""

from __future__ import annotations

import os

import pytest
import torch

from kvpress.cache import PolicyCache
from kvpress.policies import SepLLM, StreamingLLM, make_policy, separator_ids
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.kept_sets import Rule

SEPARATORS = tuple(range(5, 97, 6))
STREAM = 50_000 if os.environ.get("KVPRESS_TEST_EVERYTHING") == "1" else 1_500


def sepllm(initial: int, separators: int | None, window: int, capacity: int) -> Rule:
    def rule(step):
        kept = []
        for held in step.held:
            first = [position for position in held if position < initial]
            last = [position for position in held if position >= step.seen - window and position >= initial]
            between = [position for position in held if initial <= position < step.seen - window]
            marks = [position for position in between if step.tokens[position] in SEPARATORS]
            if separators is None:
                full = len(between) - len(marks) > capacity - initial - window
            else:
                full = len(held) > capacity
                marks = marks[len(marks) - min(separators, len(marks)) :]
            kept.append(first + marks + last if full else held)
        return kept

    return rule


@pytest.mark.parametrize(
    "numbers", [(2, 3, 4, 12), (0, 2, 5, 8), (3, 0, 3, 7), (2, None, 4, 9), (0, None, 1, 2)], ids=str
)
def test_kept_sets(gqa, mode, feed, numbers):
    initial, separators, window, capacity = numbers
    policy = SepLLM(initial=initial, separators=separators, window=window, capacity=capacity, token_ids=SEPARATORS)
    feed(gqa, policy, sepllm(*numbers), mode, steps=14)


def test_every_head_layout(model, feed):
    policy = SepLLM(initial=2, separators=3, window=4, capacity=12, token_ids=SEPARATORS)
    feed(model, policy, sepllm(2, 3, 4, 12), "padded")


@pytest.mark.parametrize("wrong", [(2, 2, 4, 12), (1, 3, 4, 12), (2, 3, 5, 12), (2, 3, 4, 11), (2, None, 4, 12)])
def test_other_numbers_are_noticed(gqa, feed, wrong):
    policy = SepLLM(initial=2, separators=3, window=4, capacity=12, token_ids=SEPARATORS)
    with pytest.raises(AssertionError, match="the rule keeps"):
        feed(gqa, policy, sepllm(*wrong), "turns", steps=14)


def test_rows_keep_their_own_separators(gqa):
    """One row has none, its neighbour many: neither is cut to the other's number."""
    poor = torch.full((1, 30), 4)
    rich = torch.full((1, 30), SEPARATORS[0])
    cache = PolicyCache(gqa, SepLLM(initial=1, separators=5, window=3, capacity=12, token_ids=SEPARATORS))
    with torch.no_grad():
        gqa(torch.cat([poor, rich]), past_key_values=cache)
    kept = cache.kept_positions(0)[:, 0].tolist()
    assert [position for position in kept[0] if position >= 0] == [0, 27, 28, 29]
    assert kept[1] == [0, 22, 23, 24, 25, 26, 27, 28, 29]


def run(model, policy, ids, prompt=20):
    cache = PolicyCache(model, policy)
    kept = []
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        for token in ids[0, prompt:]:
            model(token.view(1, 1), past_key_values=cache)
            kept.append([cache.kept_positions(layer).tolist() for layer in range(2)])
    return kept


def test_without_separators_it_is_streaming_llm():
    model, ids = tiny_model("llama"), random_tokens(1, 60)
    numbers = {"initial": 2, "window": 6, "capacity": 13}
    own = run(model, SepLLM(**numbers, separators=3, token_ids=()), ids)
    unbounded = run(model, SepLLM(**numbers, separators=None, token_ids=()), ids)
    streaming = run(model, StreamingLLM(budget=8, sinks=2, interval=6), ids)
    assert own == unbounded == streaming
    assert own != run(model, SepLLM(**numbers, separators=3, token_ids=SEPARATORS), ids)


def test_a_stream_stays_flat():
    """Memory and copied bytes do not grow with the stream."""
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=10**6)
    cache = PolicyCache(model, SepLLM(initial=4, separators=8, window=16, capacity=48, token_ids=SEPARATORS))
    tokens = random_tokens(STREAM, seed=5)
    layer, sizes, buffers = cache.policy_layers[0], set(), 0
    before = None
    with torch.inference_mode():
        for step, token in enumerate(tokens):
            model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
            if step >= 100:
                sizes.add(cache.nbytes)
                buffers += layer.table.keys.data_ptr() != before
                before = layer.table.keys.data_ptr()
                assert layer.table.count <= 48
    assert cache.seen_tokens == STREAM
    assert len(sizes) <= 3 and max(sizes) <= 49 * layer.table.bytes_per_token
    assert buffers <= STREAM / 20 + 2  # a cut frees 20 tokens, and only a cut copies
    kept = cache.kept_positions(0)[0, 0].tolist()
    assert kept[:4] == [0, 1, 2, 3] and kept[-1] == STREAM - 1
    between = [
        position for position in kept[4:] if position < STREAM - 36
    ]  # outside the window, even one token before a cut
    assert between and all(int(tokens[position]) in SEPARATORS for position in between)


def test_unbounded_grows_by_separators_alone():
    model = tiny_model("llama", num_hidden_layers=1)
    cache = PolicyCache(model, SepLLM(initial=2, separators=None, window=4, capacity=10, token_ids=SEPARATORS))
    ids = random_tokens(1, 300)
    with torch.no_grad():
        for token in ids[0]:
            model(token.view(1, 1), past_key_values=cache)
    held = int(cache.policy_layers[0].table.held.max())
    marks = sum(token in SEPARATORS for token in ids[0, 2:-4].tolist())
    assert marks + 6 <= held <= marks + 10
    assert held < 100


class Words:
    """A tokenizer of whole words."""

    words = ("<s>", "a", ".", " ,", ";\n", "...", "  ", "\n", "\t", "?!", "", "b.", ":", " ! ")
    all_special_ids = (0,)

    def get_vocab(self):
        return {word: index for index, word in enumerate(self.words)}

    def decode(self, token_ids):
        return "".join(self.words[index] for index in token_ids)


def test_separator_ids():
    assert separator_ids(Words()) == (2, 3, 4, 6, 7, 8, 12, 13)
    assert separator_ids(Words(), whitespace=False) == (2, 3, 4, 12, 13)


def test_without_a_tokenizer_ids_must_be_given():
    with pytest.raises(ValueError, match=r"token_ids of sepllm must be given, as separator_ids\(tokenizer\)"):
        PolicyCache(tiny_model("llama"), SepLLM())


def test_to_dict_and_back():
    policy = SepLLM(separators=None, token_ids=[3, 4])
    data = policy.to_dict()
    assert "budget" not in data and "interval" not in data
    assert SepLLM.from_dict(data) == policy == make_policy("sepllm", separators=None, token_ids=(3, 4))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"initial": -1}, "initial of sepllm must be an integer >= 0"),
        ({"window": 0}, "window of sepllm must be an integer >= 1"),
        ({"separators": -1}, "separators of sepllm must be an integer >= 0"),
        ({"capacity": 324}, r"capacity of sepllm must be larger than 324 \(initial=4"),
        ({"token_ids": (1, -1)}, "token_ids of sepllm must be an integer >= 0"),
        ({"positions": "shift"}, "positions of sepllm must be one of"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        SepLLM(**arguments)
