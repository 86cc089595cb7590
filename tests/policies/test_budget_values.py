"""Budgets as values: what is read from what a user writes, and the tokens that come of it. Numbers by hand, edges on both sides."""

import numpy
import pytest

from kvpress.policies.budget import Budget, frozen_budgets, layer_budgets, parse_bytes, token_budgets

RULE = r"^budget must be tokens \(an int >= 1\), a share of the prompt \(a float in \(0, 1\]\) or bytes \(like '256MB'\), got "


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("7 B", 7),
        ("1.5KB", 1_500),
        ("2kb", 2_000),
        ("3MB", 3_000_000),
        ("4GB", 4_000_000_000),
        ("5TB", 5_000_000_000_000),
        ("1KiB", 1_024),
        (" 1.5 MiB ", 1_572_864),
        ("2GiB", 2_147_483_648),
        ("1TiB", 1_099_511_627_776),
        (1, 1),
        (numpy.int64(12), 12),
    ],
)
def test_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "12", "MB", "1 parsec", "-1MB", "1,5MB", "1.MB", "1MB2", None, 1.5, True, False])
def test_no_bytes(text):
    with pytest.raises(ValueError, match=r"^memory must be bytes with a unit, like '256MB' or '1.5GiB', got "):
        parse_bytes(text, field="memory")


@pytest.mark.parametrize("text", ["0B", "0.4B", 0, -3])
def test_less_than_a_byte(text):
    with pytest.raises(ValueError, match=r"^bytes must be at least one byte, got "):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        (1, Budget(tokens=1)),
        (numpy.int64(7), Budget(tokens=7)),
        (1.0, Budget(share=1.0)),
        (0.25, Budget(share=0.25)),
        (numpy.float64(0.5), Budget(share=0.5)),
        ("2KB", Budget(size=2_000)),
    ],
)
def test_parsed(value, budget):
    assert Budget.parse(value) == budget
    assert [budget.tokens, budget.share, budget.size].count(None) == 2


@pytest.mark.parametrize(
    "value", [0, -1, True, False, 0.0, -0.5, 1.0000001, float("nan"), float("inf"), None, [], {}, 1j]
)
def test_refused(value):
    with pytest.raises(ValueError, match=RULE):
        Budget.parse(value)


def test_tokens_and_shares_of_each_row():
    assert Budget(tokens=9).resolve((4, 30), 100) == [9, 9]
    assert Budget(share=0.25).resolve((1, 3, 4, 7, 8, 40), 100) == [1, 1, 1, 1, 2, 10]
    assert Budget(share=1.0).resolve((1, 5), 100) == [1, 5]
    assert Budget(share=0.1).resolve((10, 30, 29), 100) == [1, 3, 2]  # 0.1 * 30 is a little above 3
    assert Budget(share=0.29).resolve((100, 99), 100) == [29, 28]  # 0.29 * 100 is a little below 29


def test_bytes_pay_for_tokens_the_spare_ones_and_what_is_fixed():
    assert Budget(size=1_000).resolve((50, 2), 10) == [99, 99]
    assert Budget(size=1_000).resolve((50,), 10, 200) == [79]
    assert Budget(size=1_009).resolve((50,), 10, 200, spare=4) == [76]
    assert Budget(size=1_010).resolve((50,), 10, 200, spare=4) == [77]
    assert Budget(size=220).resolve((50,), 10, 200) == [1]
    with pytest.raises(
        ValueError, match=r"^budget of 219 bytes is too small: one token and 1 for those to come take 220 bytes$"
    ):
        Budget(size=219).resolve((50,), 10, 200)
    with pytest.raises(ValueError, match=r"one token and 3 for those to come take 47 bytes$"):
        Budget(size=46).resolve((50,), 10, 7, spare=3)
    with pytest.raises(ValueError, match="too small"):
        Budget().resolve((50,), 10, 7)


def test_frozen():
    assert frozen_budgets(12) == 12 and frozen_budgets(0.5) == 0.5 and frozen_budgets("1MB") == "1MB"
    assert frozen_budgets([4, [5, 0.5], (6, 7)]) == (4, (5, 0.5), (6, 7))
    assert frozen_budgets((4,)) == (4,)
    for value in ([], ()):
        with pytest.raises(ValueError, match=r"^limit must have an entry for each compressed layer, got "):
            frozen_budgets(value, field="limit")
    for value in (["1MB"], [4, [5, "1MB"]], [[]], [4, ()]):
        with pytest.raises(
            ValueError, match=r"^entries of limit must be tokens or shares, bytes are of the whole cache, got "
        ):
            frozen_budgets(value, field="limit")
    for value in (0, [0], [4, [5, 0]], [True], None):
        with pytest.raises(ValueError, match=r"^limit must be tokens "):
            frozen_budgets(value, field="limit")


def test_those_in_tokens():
    assert token_budgets(9) == [9]
    assert token_budgets(0.5) == token_budgets("1MB") == []
    assert token_budgets((4, 0.5, (6, 0.25, 7))) == [4, 6, 7]


def test_of_a_layer():
    assert layer_budgets(9, 3, 5) == [Budget(tokens=9)]
    assert layer_budgets("1KB", 0, 1) == [Budget(size=1_000)]
    assert layer_budgets((4, (5, 0.5)), 0, 2) == [Budget(tokens=4)]
    assert layer_budgets((4, (5, 0.5)), 1, 2) == [Budget(tokens=5), Budget(share=0.5)]
    for value in ((4,), (4, 5, 6)):
        with pytest.raises(
            ValueError, match=rf"^budget must have an entry for each of 2 compressed layers, got {len(value)}$"
        ):
            layer_budgets(value, 0, 2)


def test_a_byte_short_of_a_token_is_a_token_less():
    assert Budget.parse("99B").resolve([1000], 10) == [8]
    assert Budget.parse("100B").resolve([1000], 10) == [9]
