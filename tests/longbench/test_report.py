"""The page stands alone, escapes every name, and shows what the results say."""

import json
import random
import re
import sys

import pytest

from kvpress.longbench.errors import DataError, MissingExtraError
from kvpress.longbench.report import make_report
from kvpress.longbench.report.accuracy import accuracy_groups
from kvpress.longbench.report.budgets import budget_axis
from kvpress.longbench.report.load import budget_size, load_runs
from kvpress.longbench.report.resources import resource_table
from kvpress.longbench.runner import FULL, Method, ResultStore, methods_of

EVIL = "<script>alert('x')</script>&\""


def write_run(
    folder,
    *,
    benchmark="ruler",
    model="tiny",
    policies=("knorm", "snapkv"),
    budgets=(0.5, 0.25, 0.125),
    tasks=("niah_single_1", "vt"),
    count=12,
):
    rng = random.Random(0)
    quality = {
        None: 0.95,
        **{budget: 0.9 * (number + 1) / len(budgets) for number, budget in enumerate(sorted(budgets, key=str))},
    }
    settings = {"benchmark": benchmark, "model": model, "seed": 1, "query_aware": False}
    with ResultStore(folder, settings, command=["kvpress", "eval", benchmark, "--model", model]) as store:
        for method in methods_of(policies, budgets):
            share = method.budget if isinstance(method.budget, float) else 1.0 if method == FULL else 0.3
            for task in tasks:
                for index in range(count):
                    length, depth = (1000, 2000)[index % 2], (0, 50, 100)[index % 3]
                    groups = (
                        [f"{length}/{depth}%", f"average/{length}"]
                        if benchmark == "needle"
                        else [f"{task}/1000", "average/1000"]
                    )
                    store.append(
                        {
                            "sample": f"{task}/{index}",
                            "task": task,
                            "groups": groups,
                            "method": method.label,
                            "policy": method.policy,
                            "budget": method.budget,
                            "score": float(rng.random() < quality[method.budget]),
                            "cache_bytes": int(share * 1e6),
                            "full_bytes": 1_000_000,
                            "prefill_seconds": 1.0,
                            "decode_seconds": 0.5,
                            "new_tokens": 11,
                            "details": {"cell": [length, depth]},
                        }
                    )
    return folder


def write_perplexity(folder, budgets=(0.5, 0.25)):
    with ResultStore(folder, {"benchmark": "perplexity", "model": "tiny", "seed": 1}) as store:
        for method in methods_of(["knorm", "snapkv"], budgets):
            loss = 0 if method == FULL else 0.2 / method.budget
            for index in range(3):
                store.append(
                    {
                        "sample": f"w{index}",
                        "task": "perplexity",
                        "method": method.label,
                        "policy": method.policy,
                        "budget": method.budget,
                        "tokens": 40,
                        "nll": 40 * (2 + loss),
                        "kl": 40 * loss,
                        "agreement": 30.0,
                        "cache_bytes": 10,
                        "full_bytes": 20,
                        "buckets": [{"tokens": 10, "nll": 1.0, "kl": loss}] * 4,
                    }
                )
    return folder


def test_page_is_self_contained_with_figures_and_commands(tmp_path):
    path = make_report(write_run(tmp_path / "run"))
    page = path.read_text()
    assert path == tmp_path / "run" / "report" / "report.html"
    for name in ("accuracy.png", "resources.png"):
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"""(src|href)=["']?(https?:|//|[\w./]+\.(png|css|js))""", page) and "<script" not in page
    assert "kvpress eval ruler --model tiny" in page
    totals = load_runs(tmp_path / "run")[0].totals["methods"]["snapkv@0.25"]["groups"]["vt/1000"]
    assert f"{totals['score']:.1f} <small>[{totals['lower']:.0f}, {totals['upper']:.0f}] n=12</small>" in page


def test_names_are_escaped_everywhere(tmp_path):
    folder = write_run(tmp_path / "run", model=EVIL, tasks=(EVIL,), policies=(EVIL,))
    with ResultStore(folder, json.loads((folder / "run.json").read_text())["settings"]) as store:
        from kvpress.longbench.sample import Skipped

        store.write_skipped([Skipped(EVIL, 3, EVIL)])
    page = make_report(folder).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 5


def test_same_results_same_bytes(tmp_path):
    write_run(tmp_path / "run")
    pages = [make_report(tmp_path / "run", tmp_path / name).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_many_runs_on_one_page(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", benchmark="needle", tasks=("needle",))
    write_perplexity(tmp_path / "c")
    path = make_report(tmp_path)
    page = path.read_text()
    assert page.count("<h2") == 3
    names = {file.name for file in path.parent.glob("*.png")}
    assert names == {
        "1-accuracy.png",
        "1-resources.png",
        "2-needle.png",
        "2-accuracy.png",
        "2-resources.png",
        "3-divergence.png",
        "3-course.png",
        "3-resources.png",
    }


def test_order_axis_and_tables(tmp_path):
    run = load_runs(write_run(tmp_path / "run"))[0]
    assert run.methods == ["full", *(f"{p}@{b}" for p in ("knorm", "snapkv") for b in (0.5, 0.25, 0.125))]
    assert accuracy_groups(run) == ["average/1000", "niah_single_1/1000", "vt/1000"]
    axis = budget_axis(run)
    assert axis.percent and axis.places["knorm@0.125"] == 12.5
    entry = resource_table(run)[2]
    assert (
        entry["method"] == "knorm@0.25" and entry["share"] == pytest.approx(25) and entry["speed"] == pytest.approx(20)
    )
    tokens = budget_axis(load_runs(write_run(tmp_path / "tokens", budgets=(64, 128)))[0])
    assert (tokens.label, tokens.places["knorm@64"]) == ("Budget (tokens)", 64)
    mixed = budget_axis(load_runs(write_run(tmp_path / "mixed", budgets=(64, "1MB")))[0])
    assert mixed.label.startswith("Memory") and mixed.places["knorm@1MB"] == 30
    sizes = [budget_size({"budget": budget}) for budget in (None, 0.5, 64, "2MB", "1.5 GiB", "7B")]
    assert sizes == [0, 0.5, 64, 2 * 2**20, 1.5 * 2**30, 7]


def test_full_cache_alone_can_be_shown(tmp_path):
    assert make_report(write_run(tmp_path / "run", policies=())).exists()


def test_folders_without_results_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no run with results"):
        make_report(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(DataError, match=r"run\.json: not a run's description"):
        make_report(tmp_path)


@pytest.mark.parametrize(("module", "extra"), [("matplotlib", "plot"), ("jinja2", "eval")])
def test_missing_library_names_the_extra(module, extra, tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"kvpress-cache\[{extra}\]"):
        make_report(tmp_path)


def test_policy_label_of_a_method_is_its_name_in_the_page(tmp_path):
    assert Method("snapkv", 0.25).label in make_report(write_run(tmp_path)).read_text()
