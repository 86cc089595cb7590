"""Intervals against textbook values and against simulation."""

import random

import pytest

from kvpress.longbench.statistics import mean_interval, stratified_interval, wilson


def test_wilson_textbook_values():
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for count, total, lower, upper in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(count / total, total) == pytest.approx((lower, upper), abs=5e-5)


def test_binary_scores_take_wilson_and_others_bootstrap():
    assert mean_interval([1, 0, 1.0]).method == "wilson"
    interval = mean_interval([0.25, 0.5, 1.0])
    assert interval.method == "bootstrap"
    assert interval.lower < interval.mean < interval.upper


def test_bootstrap_ignores_the_order_and_covers():
    rng = random.Random(0)
    covered = 0
    for trial in range(200):
        scores = [rng.choice((0.0, 0.25, 0.5, 1.0)) for _ in range(40)]
        interval = mean_interval(scores, seed=trial)
        covered += interval.lower <= 0.4375 <= interval.upper
    assert 0.90 <= covered / 200 <= 0.99
    rng.shuffle(scores)
    assert mean_interval(scores, seed=trial) == interval


def test_stratified_mean_weighs_tasks_equally():
    interval = stratified_interval({"a": [1.0] * 9 + [0.5], "b": [0.0, 0.5]})
    assert interval.mean == pytest.approx((0.95 + 0.25) / 2)
    assert interval.lower < interval.mean < interval.upper and interval.count == 12
    assert stratified_interval({"a": [1.0, 0.0]}) == mean_interval([1.0, 0.0])


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="confidence must lie"):
        mean_interval([1.0], confidence=1.0)
