"""A local cluster of two workers: equal totals, also when a worker is killed in its work."""

import os
import random
from pathlib import Path

import pytest

from kvpress.longbench.benchmarks import RayCluster, Run, run_ruler
from kvpress.longbench.prompt import EncodedPrompt
from kvpress.longbench.runner import FULL, Answer, Method, ResultStore
from kvpress.longbench.runner.evaluate import evaluate, evaluate_with
from kvpress.longbench.runner.ray_workers import ray_workers
from kvpress.longbench.sample import Sample

ray = pytest.importorskip("ray", reason="needs the extra ray")

METHODS = [FULL, Method("half", 0.5)]


class PlainEncoder:
    def encode(self, sample):
        return EncodedPrompt((1,), (2,))


class ScriptedEngine:
    """Half of the references, chosen by method and sample; dies in one item if a marker file is not there yet."""

    def __init__(self, marker=None, always=False):
        self.marker, self.always = marker, always

    def answers(self, method, batch):
        for sample, prompt in batch:
            if sample.sample_id == "s3" and self.marker is not None and (self.always or not Path(self.marker).exists()):
                Path(self.marker).touch()
                os.kill(os.getpid(), 9)
            rng = random.Random(f"{method.label}{sample.sample_id}")
            text = " ".join(reference for reference in sample.references if rng.random() < 0.5)
            yield Answer(text, len(prompt), 1, 0.5, 0.25, 50, 100)


def samples():
    return [
        Sample("t", f"s{i}", f"context {i % 4}", "q", " A:", (f"x{i}", f"y{i}"), "string_match_all", 8, ("t",))
        for i in range(10)
    ]


def totals_bytes(folder):
    return (folder / "totals.json").read_bytes()


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=2, _node_ip_address="127.0.0.1", include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    yield
    ray.shutdown()


@pytest.fixture
def alone(tmp_path):
    with ResultStore(tmp_path / "alone", {"seed": 1}) as store:
        evaluate(samples(), METHODS, ScriptedEngine(), PlainEncoder(), store, progress=False)
    return totals_bytes(tmp_path / "alone")


def run(folder, **options):
    answer_all = ray_workers(lambda: (ScriptedEngine(**options), PlainEncoder()), workers=2)
    with ResultStore(folder, {"seed": 1}) as store:
        return evaluate_with(answer_all, samples(), METHODS, store, progress=False)


@pytest.mark.timeout(600)
def test_two_workers_give_the_totals_of_one_process(cluster, tmp_path, alone):
    totals = run(tmp_path / "ray")
    assert totals["samples"] == 20 and 0 < totals["methods"]["full"]["groups"]["t"]["score"] < 100
    assert totals_bytes(tmp_path / "ray") == alone


@pytest.mark.timeout(600)
def test_killed_worker_is_replaced(cluster, tmp_path, alone):
    marker = tmp_path / "died"
    run(tmp_path / "ray", marker=str(marker))
    assert marker.exists()
    assert totals_bytes(tmp_path / "ray") == alone
    assert len((tmp_path / "ray" / "samples.jsonl").read_text().splitlines()) == 20


@pytest.mark.timeout(600)
def test_worker_that_always_dies_stops_the_run_and_the_rest_is_kept(cluster, tmp_path, alone):
    with pytest.raises(RuntimeError, match="workers died 3 times on s3 under"):
        run(tmp_path / "ray", marker=str(tmp_path / "died"), always=True)
    run(tmp_path / "ray")
    assert totals_bytes(tmp_path / "ray") == alone


def test_bad_number_of_workers():
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        ray_workers(lambda: None, workers=0)


@pytest.mark.timeout(600)
def test_a_benchmark_on_two_workers_equals_one_process(cluster, tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")

    def load():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    for name, ray_cluster in (("alone", None), ("ray", RayCluster(load, workers=2))):
        run = Run(
            *load(), [FULL, Method("streaming_llm", 64)], tmp_path / name, "tiny", progress=False, ray=ray_cluster
        )
        run_ruler(run, tasks=["qa_1"], lengths=[600], samples=2)
    assert totals_bytes(tmp_path / "ray") == totals_bytes(tmp_path / "alone")
