"""The README keeps its word: its snippets run as printed, its generated blocks are in step, its commands exist."""

import importlib.util
import io
import re
import types
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from kvpress.cache_argument import USUAL

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def generate() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_three_snippets() -> None:
    assert len(SNIPPETS) == 3


@pytest.mark.skipif(USUAL != "cache", reason="the README has the argument's name since transformers 5.24")
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
@pytest.mark.usefixtures("tiny_smollm2")
def test_a_snippet_runs_as_printed(number: int) -> None:
    namespace: dict[str, object] = {"__name__": "snippet"}
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), namespace)
    assert printed.getvalue().strip()
    cache = namespace.get("cache") or namespace["compressed"]
    assert 0 < cache.nbytes < cache.full_nbytes  # type: ignore[attr-defined]  # something was evicted


def test_the_generated_blocks_are_in_step(generate: types.ModuleType) -> None:
    assert generate.updated(README) == README, "run `make docs`"


def test_a_block_out_of_step_is_noticed(generate: types.ModuleType) -> None:
    changed = README.replace("| `snapkv` |", "| `snapkw` |")
    assert changed != README
    assert generate.updated(changed) == README
    with pytest.raises(ValueError, match="markers of 'policies' once"):
        generate.updated(README.replace("<!-- policies:end -->", ""))


def test_every_make_target_of_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    documents = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^    |`)make (\w+)", documents, re.MULTILINE))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_linked_file_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
