"""The documentation of profiling keeps its word."""

import re
from pathlib import Path

import pytest

import kvpress
from kvpress import profiling
from kvpress.testing.families import random_tokens, tiny_model

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "profiling.md").read_text(encoding="utf-8")


def test_the_figures_it_names_exist() -> None:
    model = tiny_model()
    with kvpress.profile(model) as profile:
        model(random_tokens(1, 20))
    found = profile.to_dict()
    names = re.findall(r"^\| `cache\.(\w+)`", PAGE, re.MULTILINE)
    assert len(names) == 5
    assert set(names) == set(found["cache"])
    for name in ("first_token_seconds", "token_milliseconds", "prefill", "decode"):
        assert f"`{name}`" in PAGE and name in found


def test_profile_is_found_without_torch_until_it_is_asked_for() -> None:
    assert kvpress.profile is profiling.profile
    with pytest.raises(AttributeError, match="no attribute 'profil'"):
        profiling.profil  # noqa: B018
