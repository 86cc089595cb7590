"""Every job in a process of its own, one after another, so that peaks of memory are its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from kvpress.profiling.candidates import Candidate
from kvpress.profiling.job import Job, described_policy

MODULE = "kvpress.profiling.child"


def make_jobs(
    model: str,
    candidates: Sequence[Candidate],
    contexts: Sequence[int],
    batches: Sequence[int] = (1,),
    *,
    cuda_snapshot: Path | None = None,
    **settings: Any,
) -> list[Job]:
    """A job for every context, batch size and candidate, small ones first.

    Args:
        cuda_snapshot: folder for a file of each job.
        settings: other fields of `Job`.

    Raises:
        ValueError: a policy that refuses its parameters at some context.
    """
    jobs = []
    for context, batch, candidate in product(contexts, batches, candidates):
        policy = candidate.policy(context)
        described = None if policy is None else described_policy(policy)
        file = None
        if cuda_snapshot is not None:
            name = "".join(letter if letter.isalnum() else "-" for letter in candidate.label)
            file = str(cuda_snapshot / f"{name}-{context}-{batch}.pickle")
        given = {"cuda_snapshot": file, "kv_dtype": candidate.kv_dtype, **settings}
        jobs.append(Job(model, candidate.label, described, context, batch, **given))
    return jobs


def run_jobs(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """The figures of each job as JSON types, as they come; a job that failed has `"error"`, a sentence, in their place."""
    for job in jobs:
        yield run_job(job)


def run_job(job: Job) -> dict[str, Any]:
    """One job in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.run(
        [sys.executable, "-P", "-m", MODULE],
        input=json.dumps(job.to_dict()),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        check=False,
    )
    asked = {key: value for key, value in job.to_dict().items() if key != "cuda_snapshot"}
    if process.returncode < 0:
        return {**asked, "error": _killed(-process.returncode)}
    try:
        result: dict[str, Any] = json.loads(process.stdout)
    except ValueError:
        last = process.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return {**asked, "error": f"the process ended with code {process.returncode}: {last[0]}"}
    if "error" in result:
        return {**asked, "error": f"{result['error']['type']}: {result['error']['message']}"}
    return result


def _killed(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"the process was ended by {name}" + (", most likely out of memory" if name == "SIGKILL" else "")
