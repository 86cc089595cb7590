"""The documentation keeps its word: code blocks run as printed, every policy has a page that says when not to use it."""

import importlib.util
import re
from pathlib import Path

import pytest

from kvpress import PolicyCache
from kvpress.policies import describe_policies
from kvpress.policies.registry import _POLICIES, policy_class

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCKS = {
    page.name: re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL) for page in DOCS.glob("*.md")
}
PAGES = sorted(name for name, blocks in BLOCKS.items() if blocks)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is forgotten after it."""
    monkeypatch.setattr("kvpress.policies.registry._POLICIES", dict(_POLICIES))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("tiny_smollm2", "registry")
def test_the_blocks_of_a_page_run_in_order(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {"__name__": "snippet"}
    for number, block in enumerate(BLOCKS[page]):
        exec(compile(block, f"{page} block {number}", "exec", dont_inherit=True), namespace)
    caches = [value for value in namespace.values() if isinstance(value, PolicyCache)]
    assert caches
    assert capsys.readouterr().out or any(cache.seen_tokens > 0 for cache in caches)


def test_pages_with_code_are_found() -> None:
    assert {"index.md", "tutorial.md", "selection.md", "writing-a-policy.md", "transformers.md"} <= set(PAGES)


def test_every_policy_has_a_page() -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("policy_pages", DOCS / "policy_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for row in describe_policies():
        page = module.policy_page(row)
        assert row.summary in page
        assert policy_class(row.name).fails in page
        assert policy_class(row.name).fails
        assert all(f"`{name}`" in page for name in row.parameters)
