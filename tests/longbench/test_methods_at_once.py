"""A run whose methods share prefills writes what a run without writes, resumes likewise, and caps answers where asked."""

import json
from dataclasses import replace

import pytest

from kvpress.longbench.benchmarks import Run, run_ruler
from kvpress.longbench.runner import FULL, Method

METHODS = [
    FULL,
    Method("streaming_llm", 0.25),
    Method("knorm", 0.5),
    Method("tova", 0.25),
    Method("quest", None, {"top_k": 32}),
    Method("full", None, {"kv_dtype": "int8"}),
]
TIMES = ("prefill_seconds", "decode_seconds")


def lines(folder):
    """Result lines without their times, in an order of their own."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return sorted(json.dumps({name: value for name, value in row.items() if name not in TIMES}) for row in rows)


@pytest.fixture
def run(model, tokenizer, tmp_path):
    return Run(model, tokenizer, METHODS, tmp_path / "shared", "tiny", progress=False, answer_tokens=5)


def measure(run):
    return run_ruler(run, tasks=["qa_1"], lengths=[500], samples=2)


@pytest.mark.parametrize("query_aware", [True, False])
def test_lines_and_totals_are_those_of_methods_one_by_one(query_aware, run, tmp_path):
    run = replace(run, query_aware=query_aware)
    measure(run)
    measure(replace(run, output=tmp_path / "alone", methods_at_once=1))
    assert lines(tmp_path / "shared") == lines(tmp_path / "alone") and len(lines(tmp_path / "alone")) == 12
    assert len({json.loads(line)["prediction"] for line in lines(tmp_path / "alone")}) > 2
    assert (tmp_path / "shared" / "totals.json").read_bytes() == (tmp_path / "alone" / "totals.json").read_bytes()


@pytest.mark.parametrize("together", [True, False])
def test_a_stopped_run_ends_with_equal_totals(together, run, tmp_path):
    run = replace(run, decode_together=together, methods_at_once=3)
    measure(run)
    path, whole = tmp_path / "shared" / "samples.jsonl", (tmp_path / "shared" / "totals.json").read_bytes()
    content, before = path.read_text().splitlines(keepends=True), lines(tmp_path / "shared")
    for kept in (1, 5, 8):
        path.write_text("".join(content[:kept]))
        measure(run)
        assert lines(tmp_path / "shared") == before
        assert (tmp_path / "shared" / "totals.json").read_bytes() == whole


def test_answers_are_capped_and_the_cap_is_recorded(run, tmp_path):
    measure(run)
    settings = json.loads((tmp_path / "shared" / "run.json").read_text())["settings"]
    assert settings["answer_tokens"] == 5 and settings["decode_together"] is None
    assert {json.loads(line)["new_tokens"] for line in lines(tmp_path / "shared")} == {5}
    with pytest.raises(ValueError, match="answer_tokens was 5 in this folder and is 6 now"):
        measure(replace(run, answer_tokens=6))
    for name in ("answer_tokens", "methods_at_once"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            replace(run, **{name: 0})
