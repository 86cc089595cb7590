"""What is installed: one import package out of four folders, with pins that fit what the project asks for."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"kvpress": "kvpress", "policies": "kvpress.policies", "kernels": "kvpress.kernels"}
SUFFIXES = (".py", ".pyi", ".cpp", ".hpp")
FOLDERS["longbench"] = "kvpress.longbench"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a copy of the sources, with no compiler: the native kernels are optional."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copied = ["pyproject.toml", "setup.py", "README.md", "LICENSE"]
    for folder in FOLDERS:
        copied += [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    for name in copied:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    result = subprocess.run(
        [*command, "-w", str(target), str(source)], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    (built,) = target.glob("kvpress_cache-*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_one_package_with_every_module(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"kvpress"}
    modules = 0
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = package.replace(".", "/") + "/" + path.relative_to(ROOT / folder).as_posix()
            assert inside in wheel, f"{path} is not in the wheel: is an __init__.py missing in its folder?"
            modules += 1
    assert modules > 20
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_the_folders_are_imported_under_one_name() -> None:
    for folder, package in FOLDERS.items():
        module = importlib.import_module(package)
        assert Path(str(module.__file__)).parent == ROOT / folder


@pytest.mark.parametrize("flags", [[], ["-P"]])
def test_the_kernels_folder_does_not_stand_in_for_another_package(flags: list[str]) -> None:
    """Models import from a package called `kernels` when it is there; ours at the root must not be taken for it."""
    program = "import transformers.models.llama.modeling_llama, kvpress.kernels as k; print(k.__name__)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *flags, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert result.stdout.strip() == "kvpress.kernels", result.stderr


def test_no_code_imports_a_folder_by_its_own_name() -> None:
    pattern = re.compile(r"^\s*(?:from|import) (?:policies|kernels|longbench)\b", re.MULTILINE)
    read = 0
    for folder in (*FOLDERS, "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not pattern.search(path.read_text(encoding="utf-8")), path
            read += 1
    assert read > 20


def test_every_core_dependency_is_pinned_within_its_range() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(
        line.strip().split("==")
        for path in (ROOT / "requirements").glob("*.txt")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *extras["demo"], *extras["dev"]]]
    assert len(wanted) > 12
    for requirement in wanted:
        assert requirement.name in pins, f"requirements/ does not pin {requirement.name}"
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_torch_is_installed_before_everything_else() -> None:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    installs = [line for line in lines if "install" in line and "-r requirements/" in line]
    assert "requirements/torch.txt" in installs[0]
    assert "$(TORCH_FLAGS)" in installs[0]
    assert not any("requirements/torch.txt" in line for line in installs[1:])


def test_the_licence_is_the_whole_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    for part in ("Apache License", "Version 2.0, January 2004", "9. Accepting Warranty", "END OF TERMS AND CONDITIONS"):
        assert part in text
    assert len(text.splitlines()) > 195


def test_continuous_integration_runs_documented_commands_and_the_tests_last() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    commands = [line for line in text.splitlines() if line.startswith("make ")]
    assert commands[-1] == "make test"
    assert {"make lint", "make types", "make test"} <= set(commands)
    documents = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(
        encoding="utf-8"
    )
    for command in commands:
        assert command in documents, command
