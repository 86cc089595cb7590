"""`python -m kvpress.profiling.child`: reads a job as JSON from standard input, writes its figures as JSON to standard output."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

FAILED = 1


def main() -> int:
    """Do the job; returns the exit code. Whatever else is written to standard output goes to standard error."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answer:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        result = answer_to(json.load(sys.stdin))
        json.dump(result, answer, ensure_ascii=False)
    return FAILED if "error" in result else 0


def answer_to(data: dict[str, Any]) -> dict[str, Any]:
    """The figures, or `{"error": {"type": …, "message": …}}`: the process that asked tells the user."""
    try:
        from kvpress.profiling.job import Job
        from kvpress.profiling.measure import measure

        return measure(Job.from_dict(data))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"error": {"type": type(error).__name__, "message": lines[0]}}


if __name__ == "__main__":
    sys.exit(main())
