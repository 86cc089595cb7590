"""The commands end to end on a tiny model, with the real PolicyCache."""

import json

import pytest
from typer.testing import CliRunner

import kvpress.models
from kvpress.cli import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def tiny(monkeypatch, model, tokenizer):
    monkeypatch.setattr(kvpress.models, "load_model", lambda name, **settings: (model, tokenizer))


def invoke(*arguments, code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def rows(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_ruler_with_two_policies_two_budgets_and_a_report(tmp_path):
    arguments = [
        "eval",
        "ruler",
        "-p",
        "snapkv:window=8",
        "-p",
        "streaming_llm",
        "-b",
        "0.5",
        "-b",
        "64",
        "-t",
        "qa_1,vt",
        "-l",
        "1200",
        "-n",
        "1",
        "-o",
        tmp_path / "run",
    ]
    assert "snapkv@0.5" in invoke(*arguments).output
    found = rows(tmp_path / "run")
    assert len(found) == 2 * 5
    shares = {row["method"]: row["cache_bytes"] / row["full_bytes"] for row in found}
    assert shares["full"] == 1
    for method in ("snapkv@0.5[window=8]", "streaming_llm@0.5"):
        assert 0.4 < shares[method] < 0.6
    assert shares["streaming_llm@64"] < 0.1
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()
    invoke(*arguments)
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before
    page = invoke("report", tmp_path / "run").output.strip()
    assert "qa_1/1200" in open(page).read()  # noqa: PTH123 - the printed path is the one to open


def test_query_aware_differs_from_agnostic_for_a_policy_and_not_for_the_full_cache(tmp_path):
    for mode in ("aware", "agnostic"):
        invoke(
            "eval",
            "ruler",
            "-p",
            "snapkv",
            "-b",
            "48",
            "-t",
            "qa_1",
            "-l",
            "600",
            "-n",
            "2",
            f"--query-{mode}",
            "-o",
            tmp_path / mode,
        )
    answers = {
        mode: {(row["method"], row["sample"]): row["prediction"] for row in rows(tmp_path / mode)}
        for mode in ("aware", "agnostic")
    }
    same = {key: answers["aware"][key] == answers["agnostic"][key] for key in answers["aware"]}
    assert all(equal for (method, _), equal in same.items() if method == "full")
    assert not all(equal for (method, _), equal in same.items() if method != "full")
    assert (
        "query_aware was True in this folder"
        in invoke("eval", "ruler", "-t", "vt", "-o", tmp_path / "aware", "-l", "1200", "-n", "1", code=2).output
    )


def test_needle_and_its_heat_map(tmp_path):
    invoke(
        "eval",
        "needle",
        "-p",
        "knorm",
        "-b",
        "0.5",
        "-l",
        "400,500",
        "--depths",
        "0,100",
        "-n",
        "1",
        "-o",
        tmp_path / "n",
    )
    assert {tuple(row["details"]["cell"]) for row in rows(tmp_path / "n")} == {
        (400, 0),
        (400, 100),
        (500, 0),
        (500, 100),
    }
    invoke("report", tmp_path / "n", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "needle.png").exists()


def test_perplexity_of_policies_against_the_full_cache(tmp_path):
    result = invoke(
        "eval",
        "perplexity",
        "-p",
        "streaming_llm",
        "-b",
        "16",
        "-b",
        "1000",
        "--prefix",
        "96",
        "--continuation",
        "24",
        "-n",
        "2",
        "-o",
        tmp_path / "p",
        "--json",
    )
    methods = json.loads(result.output)["methods"]
    assert methods["streaming_llm@1000"]["kl"] < 1e-6 < methods["streaming_llm@16"]["kl"]
    assert methods["streaming_llm@1000"]["ratio"] == pytest.approx(1, abs=1e-4)
    invoke("report", tmp_path / "p")


def test_longbench_from_a_folder_with_a_bad_line(tmp_path):
    row = {"input": "Who?", "context": "Ada did it. " * 300, "answers": ["Ada"], "length": 900, "all_classes": None}
    (tmp_path / "hotpotqa.jsonl").write_text("\n".join([json.dumps(row), "{", json.dumps({**row, "input": "Why?"})]))
    result = invoke(
        "eval",
        "longbench",
        "--data",
        tmp_path,
        "-t",
        "hotpotqa",
        "--max-length",
        "300",
        "-p",
        "snapkv",
        "-b",
        "64",
        "-o",
        tmp_path / "out",
    )
    assert "1 left out" in result.output
    found = rows(tmp_path / "out")
    assert len(found) == 4 and all(row["prompt_tokens"] <= 302 for row in found)
    skipped = json.loads((tmp_path / "out" / "skipped.jsonl").read_text())
    assert (skipped["line"], skipped["source"]) == (2, str(tmp_path / "hotpotqa.jsonl"))
    page = tmp_path / "out" / "report" / "report.html"
    invoke("report", tmp_path / "out")
    assert "hotpotqa.jsonl:2: not JSON" in page.read_text()


def test_longbench_v2_from_a_file(tmp_path):
    row = {
        "_id": "a",
        "difficulty": "easy",
        "length": "short",
        "question": "Q",
        "choice_A": "1",
        "choice_B": "2",
        "choice_C": "3",
        "choice_D": "4",
        "answer": "B",
        "context": "Text. " * 50,
    }
    (tmp_path / "data.json").write_text(json.dumps([row]))
    invoke("eval", "longbench-v2", "--data", tmp_path, "--max-length", "400", "-o", tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "totals.json").read_text())["methods"]["full"]["groups"]) == {
        "overall",
        "easy",
        "short",
    }


def test_kv_dtype_and_a_report_as_json(tmp_path):
    given = ["eval", "ruler", "-p", "tova", "-b", "0.5", "-t", "niah_single_1", "-l", "400", "-n", "1"]
    for kv_dtype in ("int8", "float16"):
        totals = json.loads(invoke(*given, "--kv-dtype", kv_dtype, "-o", tmp_path / kv_dtype, "--json").stdout)
        assert f"tova@0.5[kv_dtype={kv_dtype}]" in totals["methods"]
    shares = {row["method"]: row["cache_bytes"] / row["full_bytes"] for row in rows(tmp_path / "int8")}
    assert 0.1 < shares["tova@0.5[kv_dtype=int8]"] < 0.4 and shares["full"] == 1
    runs = json.loads(invoke("report", tmp_path, "--json").stdout)
    assert [run["name"] for run in runs] == ["float16", "int8"]
    assert runs[1]["totals"]["methods"].keys() == {"full", "tova@0.5[kv_dtype=int8]"}
    assert not (tmp_path / "report").exists()
    assert "must not be asked for at once" in invoke("report", tmp_path, "--json", "--markdown", code=2).stderr


@pytest.mark.parametrize("how", [["--query-aware"], ["--query-agnostic", "--decode-together"]])
def test_offload_changes_where_a_cache_lies_and_not_what_it_answers(tmp_path, how):
    given = ["eval", "ruler", "-p", "full", "-p", "tova", "-b", "0.5", "-t", "qa_1", "-l", "600", "-n", "2", *how]
    disk = tmp_path / "disk"
    tiers = ["--offload-host", "120kB", "--offload-disk", disk, "--offload-block", "16"]
    invoke(*given, "-o", tmp_path / "plain")
    shown = invoke(*given, *tiers, "-o", tmp_path / "spilled").output
    plain = {(row["method"], row["sample"]): row for row in rows(tmp_path / "plain")}
    spilled = {(row["method"], row["sample"]): row for row in rows(tmp_path / "spilled")}
    assert len(spilled) == 6 and len(plain) == 4
    for (method, sample), row in spilled.items():
        same = plain[method.removesuffix("[offload]"), sample]
        assert (row["prediction"], row["new_tokens"]) == (same["prediction"], same["new_tokens"])
        if method == "full":
            assert row["tiers"] == {} and row["offload"] is None
        else:
            assert row["offload"] == {"host": 120_000, "disk": str(disk), "block": 16}
            assert list(row["tiers"]) == ["host", "disk"] and 0 < row["tiers"]["host"] <= 120_000
    assert all(row["tiers"]["disk"] > 30_000 for row in spilled.values() if row["method"] == "full[offload]")
    assert list(disk.iterdir()) == [], "every cache freed its files"
    totals = json.loads((tmp_path / "spilled" / "totals.json").read_text())["methods"]
    assert totals["full[offload]"]["groups"] == totals["full"]["groups"] and "tiers" not in totals["full"]
    assert "full[offload]: mean bytes in tiers: host" in shown and ", disk " in shown
    other = [*tiers[:3], tmp_path / "disk", "--offload-block", "32"]
    assert "offload was {" in invoke(*given, *other, "-o", tmp_path / "spilled", code=2).output
    assert "| full (offload) |" in invoke("report", tmp_path / "spilled", "--markdown").output
    page = invoke("report", tmp_path / "spilled").output.strip()
    assert "<small>disk " in open(page).read()  # noqa: PTH123 - the printed path is the one to open


def test_perplexity_with_offload_is_that_without(tmp_path):
    given = ["eval", "perplexity", "-p", "full", "-p", "streaming_llm", "-b", "32", "--prefix", "200", "-n", "1"]
    short = ["--continuation", "12", "--json"]
    plain = json.loads(invoke(*given, *short, "-o", tmp_path / "plain").stdout)["methods"]
    disk = tmp_path / "disk"
    spilled = invoke(
        *given, *short, "--offload-disk", disk, "--offload-block", "8", "--kv-dtype", "float16", "-o", tmp_path / "half"
    )
    half = json.loads(spilled.stdout)["methods"]["full[kv_dtype=float16,offload]"]
    assert 0 < half["kl"] < 1e-3
    spilled = invoke(*given, *short, "--offload-disk", disk, "--offload-block", "8", "-o", tmp_path / "out")
    methods = json.loads(spilled.stdout)["methods"]
    assert methods["full[offload]"]["kl"] == 0 and methods["full[offload]"]["ratio"] == 1
    assert methods["streaming_llm@32[offload]"]["kl"] == pytest.approx(plain["streaming_llm@32"]["kl"], rel=1e-6)
    assert methods["full[offload]"]["tiers"]["disk"] > 1.4 * half["tiers"]["disk"] > 0
    assert list(disk.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    result = invoke(
        "eval", "ruler", "-t", "niah_single_1", "-l", "400", "-n", "1", "-o", tmp_path / "file" / "out", code=1
    )
    assert result.stderr.splitlines()[-1].startswith("error: ") and "Not a directory" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "ruler", "-t", "niah"], "tasks must be among niah_single_1"),
        (["eval", "ruler", "-t", "vt", "-l", "many"], "lengths must be a number of tokens such as 4096 or 16k"),
        (["eval", "ruler", "-t", "vt", "-l", "1200", "-n", "1", "-p", "snapkw", "-b", "9"], "snapkv"),
        (["eval", "ruler", "-t", "vt", "-l", "1200", "-n", "1", "-p", "snapkv", "-b", "-3"], "budget"),
        (["eval", "ruler", "-t", "vt", "-p", "tova", "-b", "9", "--kv-dtype", "int7"], "kv_dtype must be"),
        (
            ["eval", "ruler", "-t", "vt", "-p", "tova", "-b", "9", "--offload-host", "3 XB"],
            "offload-host must be bytes",
        ),
        (["eval", "needle", "-p", "tova", "-b", "9", "--offload-block", "9"], "offload-block needs offload-device"),
        (["eval", "needle", "--kind", "book"], "kind must be one of ['essay', 'noise'], got 'book'"),
        (["eval", "ruler", "--no-full"], "policy must name at least one"),
        (["eval", "longbench", "--data", "/nowhere"], "no such folder"),
        (["eval", "perplexity", "--prefix", "9000"], "the model's window holds 4096"),
        (["report", "/nowhere"], "holds no run with results"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    extra = ["-o", tmp_path / "out"] if arguments[0] == "eval" else []
    result = invoke(*arguments, *extra, code=2)
    assert message in result.output and "Traceback" not in result.output


def test_prompts_beyond_the_window_are_counted(tmp_path):
    result = invoke("eval", "ruler", "-t", "niah_single_1", "-l", "5000", "-n", "2", "-o", tmp_path / "out")
    assert "2 left out" in result.output


def test_stopped_run_says_how_it_goes_on(tmp_path, monkeypatch):
    import kvpress.longbench.benchmarks as benchmarks

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks, "evaluate", stop)
    result = invoke("eval", "ruler", "-t", "vt", "-l", "1200", "-n", "1", "-o", tmp_path / "out", code=130)
    assert "the same command goes on from here" in result.output
