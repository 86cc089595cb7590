"""Metrics against values of the official formulas and libraries (rouge 1.0.1, fuzzywuzzy 0.18, jieba 0.42.1)."""

import json
import sys
from pathlib import Path

import pytest

from kvpress.longbench.errors import MissingExtraError
from kvpress.longbench.metrics import METRICS, score
from kvpress.longbench.metrics.choice import extract_choice
from kvpress.longbench.metrics.rouge import rouge_l

GOLDEN = json.loads((Path(__file__).parent / "golden_metrics.json").read_text(encoding="utf-8"))
CASES = [(metric, *case) for metric, cases in GOLDEN.items() for case in cases]


@pytest.mark.parametrize(("metric", "prediction", "reference", "expected", "classes"), [(*c, None)[:5] for c in CASES])
def test_golden(metric, prediction, reference, expected, classes):
    if metric.endswith("_zh") and metric != "retrieval_zh":
        pytest.importorskip("jieba", reason="Chinese tasks need the extra zh")
    got = score(metric, prediction, [reference], {"all_classes": classes})
    assert got == pytest.approx(expected, abs=1e-12)


def test_goldens_cover_every_longbench_metric_with_high_and_low_scores():
    assert set(GOLDEN) | {"string_match_all", "string_match_part", "choice"} == set(METRICS)
    for metric, cases in GOLDEN.items():
        values = [case[2] for case in cases]
        assert min(values) == 0 and max(values) > 0.5, metric


def test_string_match_counts_shares_or_any():
    text = " The values are 12\x0034, \x01ABC and more.\n"
    assert score("string_match_all", text, ["abc", "34", "zzz", "1234"], {}) == 0.5
    assert score("string_match_part", text, ["zzz", "abc"], {}) == 1
    assert score("string_match_part", text, ["zzz"], {}) == 0


def test_best_reference_counts_and_first_line_rule():
    assert score("qa_f1", "paris", ["London", "Paris"], {}) == 1
    text = "\n\nparis\nQuestion: something else"
    assert score("qa_f1", text, ["Paris"], {"first_line": True}) == 1
    assert score("qa_f1", text, ["Paris"], {}) < 1


def test_long_texts_do_not_exhaust_recursion():
    text = " ".join(f"w{number}" for number in range(sys.getrecursionlimit()))
    assert rouge_l(text, text) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is C**", "C"),
        ("I choose D", None),
        ("The correct answer is E", None),
        ("The correct answer is B, no: The correct answer is (A)", "A"),
    ],
)
def test_choice(answer, letter):
    assert extract_choice(answer) == letter
    assert score("choice", answer, ["A"], {}) == (letter == "A")


def test_errors():
    with pytest.raises(ValueError, match="metric must be one of"):
        score("bleu", "a", ["b"], {})
    with pytest.raises(ValueError, match="references must hold"):
        score("qa_f1", "a", [], {})
    with pytest.raises(ValueError, match="reference must match"):
        score("retrieval", "1", ["12"], {})


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.fuzz", None)
    with pytest.raises(MissingExtraError, match=r"kvpress-cache\[eval\]"):
        score("code_similarity", "a", ["b"], {})
