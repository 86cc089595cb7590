"""Tables in Markdown: every method in its cell, with its interval."""

import json

import pytest
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.longbench.arguments import parse_methods
from kvpress.longbench.report.markdown import markdown_tables


def write_run(folder, rows, benchmark="ruler"):
    folder.mkdir(parents=True)
    description = {
        "format": 1,
        "settings": {"benchmark": benchmark, "query_aware": True},
        "commands": [["kvpress", "eval", "ruler", "-o", "a folder"]],
        "versions": {},
    }
    (folder / "run.json").write_text(json.dumps(description))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(policy, budget, score, sample, options=()):
    label = policy + ("" if budget is None else f"@{budget}") + str(dict(options) or "")
    return {
        "sample": f"s{sample}",
        "task": "niah",
        "groups": ["niah/1024", "average/1024"],
        "method": label,
        "policy": policy,
        "budget": budget,
        "options": dict(options),
        "score": score,
        "cache_bytes": 1,
        "full_bytes": 2,
    }


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_scores_by_policy_and_budget(tmp_path):
    rows = [row("full", None, 1, i) for i in range(4)]
    rows += [row("snapkv", 0.25, i == 0, i) for i in range(4)]
    rows += [row("snapkv", 0.5, 1, i) for i in range(4)]
    rows += [row("snapkv", 0.5, 0, i, {"kernel_size": 31}) for i in range(2)]
    rows += [row("odd|name", 512, 0, i) for i in range(4)]
    write_run(tmp_path / "run", rows)
    table = markdown_tables(tmp_path)
    assert (
        "    kvpress eval ruler -o 'a folder'" in table
        and "niah/1024: percent with 95 % interval, n = 2 to 4." in table
    )
    header, rule, *body = cells(table.replace("\\|", "/"))
    assert header == ["policy", "512", "50 %", "25 %", "no budget"] and set(rule) == {"---"}
    assert body == [
        ["full", "", "", "", "100 (51-100)"],
        ["odd/name", "0 (0-49)", "", "", ""],
        ["snapkv", "", "100 (51-100)", "25 (5-70)", ""],
        ["snapkv (kernel_size=31)", "", "0 (0-66)", "", ""],
    ]


def test_perplexity(tmp_path):
    def scores(policy, budget, nll):
        values = {"tokens": 10, "nll": nll, "kl": nll - 20, "agreement": 5, "cache_bytes": 1, "full_bytes": 2}
        return {**row(policy, budget, 0, 0), **values}

    write_run(tmp_path / "run", [scores("full", None, 20.0), scores("knorm", 0.5, 30.0)], "perplexity")
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--markdown"])
    assert result.exit_code == 0
    assert ["knorm", "2.718 (KL 1.000)", ""] in cells(result.output)
    assert "perplexity 7.39 over 10 tokens, 1 windows" in result.output
    assert not (tmp_path / "report").exists()


def test_a_policy_without_a_budget_comes_once():
    methods = parse_methods(["snapkv", "quest:top_k=64", "sepllm"], ["0.5", "64"], full=True)
    assert [method.label for method in methods] == [
        "full",
        "snapkv@0.5",
        "snapkv@64",
        "quest[top_k=64]",
        "sepllm",
    ]


def test_kv_dtype_goes_to_every_policy_that_has_none_of_its_own():
    methods = parse_methods(["tova", "knorm:kv_dtype=float16"], ["64"], full=True, kv_dtype="int8")
    assert [method.label for method in methods] == ["full", "tova@64[kv_dtype=int8]", "knorm@64[kv_dtype=float16]"]


@pytest.mark.parametrize(
    ("policy", "budget", "kv_dtype", "message"),
    [
        ("unheard_of", "64", None, "policy must be one of"),
        ("snapkw", "64", None, "did you mean 'snapkv'"),
        ("snapkv:windw=3", "64", None, "windw"),
        ("snapkv:window=3,window=4", "64", None, "'window' comes twice"),
        ("snapkv", "1.5", None, "budget must be"),
        ("snapkv", "64", "int7", "kv_dtype must be"),
        ("snapkv:kv_dtype=int7", "64", None, "kv_dtype must be"),
    ],
)
def test_what_a_cache_would_refuse_is_refused_before_a_model_is_loaded(policy, budget, kv_dtype, message):
    with pytest.raises(ValueError, match=message):
        parse_methods([policy], [budget], full=True, kv_dtype=kv_dtype)
    with pytest.raises(ValueError, match="snapkv needs budget"):
        parse_methods(["snapkv"], [], full=True)
