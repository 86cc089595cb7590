"""`kvpress profile`, `kvpress fit` and `kvpress bench`, as a user types them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.longbench.errors import MissingExtraError
from kvpress.policies import policy_names
from kvpress.profiling import measure as measuring
from kvpress.profiling import page, run
from kvpress.profiling.context import weights_bytes
from kvpress.profiling.job import Job
from kvpress.profiling.quantities import written_bytes
from kvpress.testing.tiny_checkpoint import tiny_model

runner = CliRunner()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs are done in this process, which is quicker; returns those done. (`test_fresh_processes` starts real ones.)"""
    done: list[Job] = []

    def run_jobs(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        for job in jobs:
            done.append(job)
            if job.context == 99:
                yield {**job.to_dict(), "error": "the process was ended by SIGKILL"}
            else:
                yield json.loads(json.dumps(measuring.measure(job)))

    monkeypatch.setattr(run, "run_jobs", run_jobs)
    return done


@pytest.mark.parametrize("command", ["profile", "fit", "bench"])
def test_help_shows_examples(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"kvpress {command}" in result.output


def test_profile_writes_lines_a_figure_and_a_page(checkpoint: str, tmp_path: Path, here: list[Job]) -> None:
    folder = tmp_path / "deep" / "out"
    arguments = ["-p", "snapkv:window=8,quest", "-b", "0.25", "-c", "128,64", "--batch", "1,2", "--new-tokens", "3"]
    result = runner.invoke(app, ["profile", "-m", checkpoint, *arguments, "--device", "cpu", "-o", str(folder)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (folder / "profile.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == len(here) == 12
    assert {(row["context"], row["batch"]) for row in rows} == {(64, 1), (64, 2), (128, 1), (128, 2)}
    assert {row["label"] for row in rows} == {"stock", "snapkv@0.25[window=8]", "quest@0.25"}
    assert "snapkv@0.25[window=8]" in result.stdout
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    html = (folder / "profile.html").read_text("utf-8")
    assert html.count("<tr") == 13
    assert "data:image/png;base64," in html and "{{" not in html
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", html)  # nothing from elsewhere
    assert "--ink" in html  # the house style is in it


def test_profile_prints_one_line_of_json_a_measurement(checkpoint: str, tmp_path: Path, here: list[Job]) -> None:
    arguments = ["-c", "64", "--new-tokens", "2", "--chunk-size", "30", "--no-plot", "--seed", "5", "--json"]
    result = runner.invoke(app, ["profile", "-m", checkpoint, *arguments, "--device", "cpu", "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["label"] for row in rows] == ["stock", "full"]
    assert [row["prefill"]["forwards"] for row in rows] == [3, 3]
    assert result.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["profile.jsonl"]
    assert {job.seed for job in here} == {5}


def test_a_failed_measurement_is_shown_and_exit_code_1(checkpoint: str, tmp_path: Path, here: list[Job]) -> None:
    result = runner.invoke(
        app,
        [
            "profile",
            "-m",
            checkpoint,
            "-c",
            "64,99",
            "--new-tokens",
            "2",
            "--no-stock",
            "--device",
            "cpu",
            "-o",
            str(tmp_path),
        ],
    )
    assert result.exit_code == 1
    assert "failed: full at 99 tokens, batch 1: the process was ended by SIGKILL" in result.stderr
    assert "failed" in result.stdout
    assert "ended by SIGKILL" in (tmp_path / "profile.html").read_text("utf-8")


def test_notes_on_standard_error(
    checkpoint: str, tmp_path: Path, here: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingExtraError("Drawing figures needs the library 'matplotlib': pip install 'kvpress-cache[plot]'")

    monkeypatch.setattr(page, "plotting_libraries", missing)
    monkeypatch.setattr(
        measuring, "generate", lambda model, ids, cache, new, chunk: model(ids[:, :8], past_key_values=cache)
    )
    given = [
        "profile",
        "-m",
        checkpoint,
        "-p",
        "full",
        "-b",
        "64",
        "-c",
        "5000",
        "--new-tokens",
        "2",
        "--device",
        "cpu",
    ]
    result = runner.invoke(app, [*given, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "no figure and no page" in result.stderr
    assert "5,002 tokens exceed the model's window of 4,096" in result.stderr
    assert "--budget says nothing to full" in result.stderr
    refused = runner.invoke(app, [*given, "--plot", "-o", str(tmp_path / "other")])
    assert refused.exit_code == 2
    assert "kvpress-cache[plot]" in refused.stderr
    assert len(here) == 2  # of the first call alone


def test_a_stopped_profile_keeps_what_it_has(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_jobs(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        yield {**jobs[0].to_dict(), "error": "x"}
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_jobs", run_jobs)
    result = runner.invoke(app, ["profile", "-m", checkpoint, "-c", "64", "--no-plot", "-o", str(tmp_path)])
    assert result.exit_code == 130
    assert "1 of 2 measurements" in result.stderr
    assert len((tmp_path / "profile.jsonl").read_text("utf-8").splitlines()) == 1


def test_profile_tells_the_bytes_of_each_tier(checkpoint: str, tmp_path: Path, here: list[Job]) -> None:
    disk = tmp_path / "disk"
    given = ["profile", "-m", checkpoint, "-p", "full", "-c", "300", "--new-tokens", "3", "--device", "cpu"]
    result = runner.invoke(app, [*given, "-o", str(tmp_path / "out"), "--offload-disk", str(disk)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "profile.jsonl").read_text("utf-8").splitlines()]
    assert [row["label"] for row in rows] == ["stock", "full"] and rows[0]["tiers"] == {}
    assert list(rows[1]["tiers"]) == ["disk"] and rows[1]["tiers"]["disk"] > rows[1]["kv_logical_bytes"] / 2
    assert rows[1]["offload"] == {"disk": str(disk)}
    for shown in (result.stdout, (tmp_path / "out" / "profile.html").read_text("utf-8")):
        assert written_bytes(rows[1]["tiers"]["disk"]) in shown and "tier" in shown
    assert list(disk.iterdir()) == []


def test_bench_tells_the_bytes_of_each_tier(checkpoint: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    given = ["bench", "-m", checkpoint, "-p", "full", "-c", "300", "--steps", "1", "--device", "cpu"]
    given += ["--offload-disk", str(disk)]
    found = json.loads(runner.invoke(app, [*given, "--json"]).stdout)
    assert found["offload"] == {"disk": str(disk)} and [row["label"] for row in found["rows"]] == ["stock", "full"]
    assert found["rows"][0]["tiers"] == {} and list(found["rows"][1]["tiers"]) == ["disk"]
    shown = runner.invoke(app, given)
    assert written_bytes(found["rows"][1]["tiers"]["disk"]) in shown.stdout and "disk tier" in shown.stdout
    assert list(disk.iterdir()) == []


def test_kv_dtype_is_measured_and_predicted(checkpoint: str, tmp_path: Path, here: list[Job]) -> None:
    given = ["-m", checkpoint, "-p", "tova,knorm:kv_dtype=bfloat16", "-b", "64", "--kv-dtype", "int8", "--json"]
    labels = ["stock", "tova@64[kv_dtype=int8]", "knorm@64[kv_dtype=bfloat16]"]
    profiled = runner.invoke(
        app, ["profile", *given, "-c", "200", "--new-tokens", "3", "--no-plot", "-o", str(tmp_path)]
    )
    rows = [json.loads(line) for line in profiled.stdout.splitlines()]
    assert [row["label"] for row in rows] == labels
    predicted = runner.invoke(app, ["fit", *given, "--memory", "1GB", "--new-tokens", "3"])
    fits = json.loads(predicted.stdout)["fits"]
    assert [fit["label"] for fit in fits] == labels
    assert [row["kv_held_bytes"] for row in rows[1:]] == [fit["kv_bytes"] for fit in fits[1:]]
    benched = runner.invoke(app, ["bench", *given, "-c", "200", "--steps", "2"])
    found = {row["label"]: row["kv_held_bytes"] for row in json.loads(benched.stdout)["rows"]}
    assert list(found) == labels and found[labels[1]] < found[labels[2]] < found[labels[0]]


@pytest.mark.parametrize("command", ["profile", "fit", "bench"])
def test_budget_and_kv_dtype_are_read_even_where_no_policy_takes_one(command: str, checkpoint: str) -> None:
    memory = ["--memory", "1GB"] if command == "fit" else []
    for wrong in (["-b", "12XB"], ["-b", "0"], ["-b", "1.5"], ["--kv-dtype", "int7"]):
        result = runner.invoke(app, [command, *memory, "-m", checkpoint, "-p", "full", *wrong])
        assert result.exit_code == 2 and wrong[0].lstrip("-")[0] in result.stderr, result.output
        assert wrong[1] in result.stderr and result.stdout == ""


def test_a_folder_that_cannot_be_made_is_one_line(checkpoint: str, tmp_path: Path, here: list[Job]) -> None:
    (tmp_path / "file").touch()
    result = runner.invoke(app, ["profile", "-m", checkpoint, "-c", "64", "-o", str(tmp_path / "file" / "out")])
    assert result.exit_code == 1 and not here
    assert result.stderr.splitlines()[-1] == f"error: '{tmp_path}/file/out': Not a directory"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "-p", "snapkw"], "did you mean 'snapkv'"),
        (["profile", "-c", "1q"], "contexts must be"),
        (["profile", "--batch", "x"], "batch must be"),
        (["profile", "-p", "tova", "-b", "-4"], "budget"),
        (["profile", "-p", "tova", "--dtype", "float12"], "dtype must be one of"),
        (["profile", "-p", "tova", "--device", "cpu", "--cuda-snapshot", "x"], "cuda-snapshot needs a CUDA device"),
        (["fit", "--memory", "8"], "memory must be bytes with a unit"),
        (["fit", "--memory", "8GB", "-p", "quset"], "did you mean 'quest'"),
        (["fit", "--memory", "8GB", "--weights", "many"], "weights must be bytes"),
        (["fit", "--memory", "8GB", "--activations", "1 armful"], "activations must be bytes"),
        (["fit", "--memory", "8GB", "-p", "quest:page_size=16", "-b", "8"], "top_k of quest"),
        (["bench", "--fill", "prose"], "fill must be one of"),
        (["bench", "--offload-block", "9"], "offload-block needs offload-device"),
        (["bench", "--offload-disk-limit", "9MB"], "offload-disk-limit needs offload-disk"),
        (["bench", "-c", "16", "-p", "quest", "-b", "0.5"], "top_k of quest"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(checkpoint: str, arguments: list[str], message: str) -> None:
    result = runner.invoke(app, [*arguments, "-m", checkpoint])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("typed", "meant"), [("proflie", "profile"), ("benhc", "bench"), ("demmo", "demo"), ("xyz", None)]
)
def test_a_mistyped_command_suggests_the_near_one_wherever_it_lives(typed: str, meant: str | None) -> None:
    result = runner.invoke(app, [typed])
    assert result.exit_code == 2
    assert f"No such command '{typed}'" in result.stderr
    assert ("Did you mean" in result.stderr) == (meant is not None)
    assert meant is None or f"Did you mean '{meant}'" in result.stderr


@pytest.mark.parametrize("command", [["profile"], ["fit", "--memory", "8GB"], ["bench"]])
def test_a_model_that_is_not_there_is_exit_code_1(command: list[str], tmp_path: Path) -> None:
    for name in ("none.gguf", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        result = runner.invoke(app, [*command, "-m", str(tmp_path / name)])
        assert result.exit_code == 1, result.output
        assert name in result.stderr


def test_fit_tells_every_policy(checkpoint: str) -> None:
    arguments = ["fit", "-m", checkpoint, "--memory", "2750kB", "--new-tokens", "16"]
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [fit["label"].split("@")[0] for fit in found["fits"]] == ["stock", *policy_names()]
    by_name = {fit["label"].split("@")[0]: fit for fit in found["fits"]}
    assert by_name["snapkv"]["context"] > by_name["stock"]["context"] >= by_name["full"]["context"] > 100
    assert found["memory_bytes"] == 2_750_000
    shown = runner.invoke(app, arguments)
    assert f"{by_name['snapkv']['context']:,}" in shown.stdout
    assert "What fits in 2.75 MB" in shown.stdout
    wide = runner.invoke(app, [*arguments, "-p", "tova", "-b", "64", "--no-stock", "--chunk-size", "32", "--json"])
    assert [fit["bound_by"] for fit in json.loads(wide.stdout)["fits"]] == ["window"]


def test_fit_where_nothing_fits(checkpoint: str) -> None:
    result = runner.invoke(app, ["fit", "-m", checkpoint, "--memory", "10kB", "-p", "tova"])
    assert result.exit_code == 1
    weights = written_bytes(weights_bytes(tiny_model()))
    assert f"nothing fits in 10 kB: the weights alone take {weights}" in result.stderr


def test_fit_reads_no_weights(checkpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "configuration"
    folder.mkdir()
    config = json.loads((Path(checkpoint) / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    result = runner.invoke(app, ["fit", "-m", str(folder), "--memory", "1GB", "-p", "full"])
    assert result.exit_code == 0, result.output
    assert "quantized" in result.stderr
    given = runner.invoke(
        app, ["fit", "-m", str(folder), "--memory", "1GB", "-p", "full", "--weights", "1MB", "--json"]
    )
    assert given.stderr == ""
    assert json.loads(given.stdout)["fits"][0]["weights_bytes"] == 10**6
