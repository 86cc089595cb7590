"""The Triton kernels run by Triton's interpreter on CPU tensors, in a process of their own: the switch is read at
import.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "triton_interpreted"
FILES = {
    "attention": 80,
    "attention_mass": 45,
    "selection": 19,
    "storage": 18,
    "eviction": 30,
    "choosing": 60,
    "prepared": 10,
}  # and the least number of tests in each


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FILES)
def test_interpreted(name: str) -> None:
    file = FOLDER / f"interpreted_{name}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=600", str(file)]
    here = {
        name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")
    }  # slow, and kernels are left out
    environment = here | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1150, check=False)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert passed is not None and int(passed.group(1)) >= FILES[name], run.stdout[-2000:]
    assert "skipped" not in run.stdout


def test_every_interpreted_file_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("interpreted_*.py")} == {f"interpreted_{name}" for name in FILES}
