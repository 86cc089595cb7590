"""Jobs in processes of their own: JSON in, JSON out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpress import PolicyCache
from kvpress.models import load_model
from kvpress.policies import KNorm, SepLLM, SnapKV
from kvpress.policies.base import Policy
from kvpress.profiling import child, run
from kvpress.profiling.candidates import make_candidates
from kvpress.profiling.job import Job, described_policy, policy_from
from kvpress.profiling.measure import generate, prose_ids
from kvpress.profiling.run import make_jobs, run_job
from kvpress.testing.tiny_checkpoint import tiny_tokenizer


def test_a_measurement_in_a_fresh_process(checkpoint: str) -> None:
    (job,) = make_jobs(
        checkpoint,
        make_candidates(["snapkv:window=8"], ["64"], stock=False),
        [200],
        [2],
        threads=1,
        new_tokens=5,
        device="cpu",
    )
    row = run_job(job)
    assert "error" not in row, row
    assert row == json.loads(json.dumps(row))
    model, tokenizer = load_model(checkpoint, device="cpu")
    cache = PolicyCache(model, SnapKV(budget=64, window=8))
    generate(model, prose_ids(tokenizer, 200, 2, seed=0), cache, 5, None)
    assert row["kv_held_bytes"] == cache.nbytes == sum(layer["held_bytes"] for layer in row["layers"])
    assert row["kv_full_bytes"] == cache.full_nbytes
    assert (row["label"], row["context"], row["batch"], row["threads"]) == ("snapkv@64[window=8]", 200, 2, 1)
    assert (row["prefill"]["tokens"], row["decode"]["tokens"]) == (400, 8)
    assert row["first_token_seconds"] > row["prefill"]["seconds"] > 0
    assert row["decode"]["tokens_per_second"] == pytest.approx(2000 / row["token_milliseconds"])
    if sys.platform == "linux":
        assert row["resident_method"] == "exact"


def test_a_job_that_fails_says_why(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(checkpoint, "knorm@1B", described_policy(KNorm(budget="1B")), 50, new_tokens=2, device="cpu")

    def answered(command: list[str], *, input: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, child.FAILED, json.dumps(child.answer_to(json.loads(input))), "")

    monkeypatch.setattr(run.subprocess, "run", answered)
    row = run_job(job)
    assert "ValueError: budget of 1 bytes is too small" in row["error"]
    assert (row["label"], row["context"]) == ("knorm@1B", 50)


@pytest.mark.parametrize(
    ("code", "output", "errors", "message"),
    [
        (-signal.SIGKILL, "", "", "SIGKILL, most likely out of memory"),
        (-signal.SIGTERM, "", "", "ended by SIGTERM"),
        (-99, "", "", "ended by signal 99"),
        (1, "", "Traceback\nImportError: no such thing\n", "code 1: ImportError: no such thing"),
        (3, "no json", "", "code 3: it said nothing"),
    ],
)
def test_a_process_that_breaks(
    code: int, output: str, errors: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess(["x"], code, output, errors)
    monkeypatch.setattr(run.subprocess, "run", lambda *args, **kwargs: done)
    row = run_job(Job("model", "full", None, 10))
    assert message in row["error"]
    assert row["label"] == "full"


def test_what_else_is_printed_does_not_reach_the_answer() -> None:
    program = (
        "import os\nfrom kvpress.profiling import child\n"
        "def noisy(data):\n    os.write(1, b'a library talks'); print('and prints')\n    return {'heard': data}\n"
        "child.answer_to = noisy\nraise SystemExit(child.main())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], input='{"a": 1}', capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"heard": {"a": 1}}
    assert "a library talks" in result.stderr and "and prints" in result.stderr


def test_a_job_survives_json(tmp_path: Path) -> None:
    policy = SepLLM(initial=2, separators=8, window=16, capacity=60, token_ids=(5, 7))
    job = Job("m", "sepllm", described_policy(policy), 10, threads=2, cuda_snapshot=str(tmp_path))
    again = Job.from_dict(json.loads(json.dumps(job.to_dict())))
    assert again.to_dict() == json.loads(json.dumps(job.to_dict()))
    assert again.policy is not None
    assert policy_from(again.policy) == policy
    with pytest.raises(ValueError, match="no field 'modell'"):
        Job.from_dict({"modell": "m"})


def test_layers_with_their_own_budgets_survive_json() -> None:
    policy = KNorm(budget=(8, (4, 0.5)))
    assert policy_from(json.loads(json.dumps(described_policy(policy)))) == policy


def test_only_policies_that_another_process_finds() -> None:
    class Local(KNorm):
        pass

    with pytest.raises(ValueError, match="can be imported"):
        described_policy(Local(budget=4))
    with pytest.raises(TypeError, match="must be a Policy"):
        policy_from({"class": "os:getcwd"})
    assert isinstance(policy_from(described_policy(KNorm(budget=4))), Policy)


def test_jobs_in_order_and_their_files(tmp_path: Path) -> None:
    candidates = make_candidates(["tova", "quest"], ["0.5"], stock=True)
    jobs = make_jobs("m", candidates, [64, 128], [1, 4], cuda_snapshot=tmp_path, seed=3)
    assert len(jobs) == 12
    assert [(job.context, job.batch, job.label) for job in jobs[:4]] == [
        (64, 1, "stock"),
        (64, 1, "tova@0.5"),
        (64, 1, "quest@0.5"),
        (64, 4, "stock"),
    ]
    assert [job.policy["top_k"] for job in jobs if job.label == "quest@0.5" and job.policy] == [32, 32, 64, 64]
    assert len({job.cuda_snapshot for job in jobs}) == 12
    assert all(job.seed == 3 for job in jobs)


def test_prose_has_the_length_asked_for() -> None:
    ids = prose_ids(tiny_tokenizer(), 5000, 3, seed=1)
    assert ids.shape == (3, 5000)
    assert torch.equal(ids, prose_ids(tiny_tokenizer(), 5000, 3, seed=1))
    assert not torch.equal(ids[0], ids[1])
