"""The documentation of profiling keeps its word."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import kvpress
from kvpress import models, profiling
from kvpress.testing.tiny_checkpoint import tiny_model, tiny_tokenizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "profiling.md").read_text(encoding="utf-8")


def test_its_snippet_runs_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.setattr(models, "load_model", lambda name: (tiny_model(), tiny_tokenizer()))
    namespace: dict[str, Any] = {}
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(snippet, "docs/profiling.md", "exec"), namespace)
    assert "Profile" in printed.getvalue()
    found = namespace["profile"].to_dict()
    for name in re.findall(r"^\| `cache\.(\w+)`", PAGE, re.MULTILINE):
        assert name in found["cache"]
    for name in ("first_token_seconds", "token_milliseconds", "prefill", "decode"):
        assert name in found


def test_profile_is_found_without_torch_until_it_is_asked_for() -> None:
    assert kvpress.profile is profiling.profile
    with pytest.raises(AttributeError, match="no attribute 'profil'"):
        profiling.profil  # noqa: B018
