"""The loop and its folder: oracle and random answers, shared contexts, resuming, broken folders."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kvpress.longbench.errors import DataError
from kvpress.longbench.ruler import TASKS, ruler_samples
from kvpress.longbench.runner import FULL, Answer, Method, ResultStore, evaluate, fit_window, methods_of
from kvpress.longbench.sample import Sample, Skipped

SETTINGS = {"benchmark": "test", "seed": 1}
METHODS = (FULL, Method("half", 0.5))


class ScriptedEngine:
    """Answers by a function of the sample; remembers the batches it was given."""

    def __init__(self, answer, stop_after=None):
        self.answer, self.stop_after, self.batches = answer, stop_after, []

    def answers(self, method, batch):
        self.batches.append((method.label, [sample.sample_id for sample, _ in batch]))
        for sample, prompt in batch:
            if self.stop_after == 0:
                raise KeyboardInterrupt
            if self.stop_after is not None:
                self.stop_after -= 1
            yield Answer(self.answer(method, sample), len(prompt), 1, 0.5, 0.25, 50, 100)


def oracle(method, sample):
    return " and ".join(sample.references)


def mixed(method, sample):
    rng = random.Random(f"{method.label}{sample.sample_id}")
    return " ".join(reference for reference in sample.references if rng.random() < 0.5)


def small_samples(count=6, contexts=3):
    return [
        Sample(
            "t",
            f"s{i}",
            f"context {i % contexts}",
            f"question {i}?",
            " A:",
            (f"x{i}", f"y{i}"),
            "string_match_all",
            8,
            ("t", "average"),
            {"line": i},
        )
        for i in range(count)
    ]


def run(folder, encoder, engine, samples=None, methods=METHODS, settings=SETTINGS, skipped=()):
    with ResultStore(folder, settings, command=["kvpress", "eval"]) as store:
        return evaluate(samples or small_samples(), methods, engine, encoder, store, skipped=skipped, progress=False)


def test_oracle_scores_100_and_noise_scores_0_on_every_ruler_task(tmp_path, encoder):
    samples = [sample for task in TASKS for sample in ruler_samples(task, 3000, 1, encoder)]
    assert len(samples) == 13
    totals = run(tmp_path / "oracle", encoder, ScriptedEngine(oracle), samples, [FULL])
    groups = totals["methods"]["full"]["groups"]
    assert len(groups) == 14 and {entry["score"] for entry in groups.values()} == {100.0}
    rng = random.Random(0)
    noise = ScriptedEngine(lambda method, sample: "".join(rng.choices("qxzj ", k=200)))
    totals = run(tmp_path / "noise", encoder, noise, samples, [FULL])
    assert {entry["score"] for entry in totals["methods"]["full"]["groups"].values()} == {0.0}


def test_rows_carry_what_a_reader_needs(tmp_path, encoder):
    totals = run(tmp_path, encoder, ScriptedEngine(oracle), skipped=[Skipped("f.jsonl", 3, "bad")])
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["method"] for row in rows} == {"full", "half@0.5"}
    assert rows[0]["seed"] == 1 and rows[0]["versions"]["torch"] and rows[-1]["budget"] == 0.5
    assert totals["methods"]["half@0.5"]["memory_share"] == 0.5 and totals["skipped"] == 1
    assert json.loads((tmp_path / "skipped.jsonl").read_text()) == {"source": "f.jsonl", "line": 3, "reason": "bad"}
    assert json.loads((tmp_path / "run.json").read_text())["commands"] == [["kvpress", "eval"]]


def test_questions_of_one_context_come_together(tmp_path, encoder):
    engine = ScriptedEngine(oracle)
    run(tmp_path, encoder, engine, methods=[FULL])
    assert engine.batches == [("full", ["s0", "s3"]), ("full", ["s1", "s4"]), ("full", ["s2", "s5"])]


@pytest.mark.parametrize("stop_after", range(12))
def test_stopped_anywhere_resumes_to_equal_totals(stop_after, tmp_path, encoder):
    run(tmp_path / "whole", encoder, ScriptedEngine(mixed))
    whole = (tmp_path / "whole" / "totals.json").read_bytes()
    assert 0 < json.loads(whole)["methods"]["full"]["groups"]["t"]["score"] < 100
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", encoder, ScriptedEngine(mixed, stop_after))
    engine = ScriptedEngine(mixed)
    run(tmp_path / "part", encoder, engine)
    assert sum(len(ids) for _, ids in engine.batches) == 12 - stop_after
    assert (tmp_path / "part" / "totals.json").read_bytes() == whole
    assert len((tmp_path / "part" / "samples.jsonl").read_text().splitlines()) == 12


def test_torn_last_line_is_cut_wherever_it_was_torn(tmp_path, encoder):
    run(tmp_path, encoder, ScriptedEngine(mixed))
    path, totals = tmp_path / "samples.jsonl", (tmp_path / "totals.json").read_bytes()
    content = path.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1
    for cut in range(last + 1, len(content), 37):
        path.write_bytes(content[:cut])
        engine = ScriptedEngine(mixed)
        run(tmp_path, encoder, engine)
        assert sum(len(ids) for _, ids in engine.batches) == 1
        assert (tmp_path / "totals.json").read_bytes() == totals


KILLED = """
import os, sys
sys.path.insert(0, {folder!r})
from test_runner import ScriptedEngine, mixed, run
from transformers import PreTrainedTokenizerFast
from kvpress.longbench.prompt import PromptEncoder
from pathlib import Path
left = 7
def deadly(method, sample):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    return mixed(method, sample)
encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_file={tokenizer!r}))
run(Path({output!r}), encoder, ScriptedEngine(deadly))
"""


def test_killed_process_resumes_to_equal_totals(tmp_path, encoder, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = KILLED.format(
        folder=str(Path(__file__).parent),
        tokenizer=str(tmp_path / "tokenizer" / "tokenizer.json"),
        output=str(tmp_path / "part"),
    )
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ}, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert len((tmp_path / "part" / "samples.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "part" / "totals.json").exists()
    run(tmp_path / "part", encoder, ScriptedEngine(mixed))
    run(tmp_path / "whole", encoder, ScriptedEngine(mixed))
    assert (tmp_path / "part" / "totals.json").read_bytes() == (tmp_path / "whole" / "totals.json").read_bytes()


def test_more_methods_may_be_added_but_settings_must_agree(tmp_path, encoder):
    run(tmp_path, encoder, ScriptedEngine(oracle), methods=[FULL])
    totals = run(tmp_path, encoder, ScriptedEngine(oracle), methods=[FULL, Method("half", 0.5)])
    assert set(totals["methods"]) == {"full", "half@0.5"}
    with pytest.raises(ValueError, match="seed was 1 in this folder and is 2 now"):
        run(tmp_path, encoder, ScriptedEngine(oracle), settings={**SETTINGS, "seed": 2})


def test_damaged_line_in_the_middle_is_named(tmp_path, encoder):
    run(tmp_path, encoder, ScriptedEngine(oracle))
    path = tmp_path / "samples.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], b'{"method": ', *lines[4:]]))
    with pytest.raises(DataError, match=r"samples\.jsonl:4: not a result line"):
        run(tmp_path, encoder, ScriptedEngine(oracle))


def test_two_runs_cannot_share_a_folder(tmp_path):
    with ResultStore(tmp_path, SETTINGS), pytest.raises(RuntimeError, match="another run is writing"):
        ResultStore(tmp_path, SETTINGS).__enter__()
    with ResultStore(tmp_path, SETTINGS):
        pass


def test_window_leaves_out_and_says_why(encoder):
    samples = small_samples(2)
    needed = encoder.length(samples[0]) + 8
    kept, skipped = fit_window(samples, encoder, needed)
    assert len(kept) == 2 and not skipped
    kept, skipped = fit_window(samples, encoder, needed - 1)
    assert not kept and f"need {needed} tokens, and the model's window holds {needed - 1}" in skipped[0].reason


def test_method_names():
    labels = [method.label for method in methods_of(["a", "full", "b"], [128, 0.5])]
    assert labels == ["full", "a@128", "a@0.5", "b@128", "b@0.5"]
    assert [method.label for method in methods_of(["a"], [], full=False)] == ["a"]
    assert Method("a", "256MB", {"window": 8}).label == "a@256MB[window=8]"


def test_equal_names_are_refused(tmp_path, encoder):
    with pytest.raises(ValueError, match="methods must be distinct, and 'full' comes twice"):
        run(tmp_path, encoder, ScriptedEngine(oracle), methods=[FULL, FULL])
    with pytest.raises(ValueError, match="samples must be distinct"):
        run(tmp_path, encoder, ScriptedEngine(oracle), samples=small_samples(2) * 2)
