"""Policies by the id of a hub repository, from a cache folder as the hub's library lays it out; nothing is downloaded."""

from pathlib import Path

import pytest

from kvpress.errors import CacheFormatError
from kvpress.policies import H2O, SnapKV
from kvpress.policy_config import PolicyConfig

REPOSITORY, COMMIT, OLDER = "someone/long-context", "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache folder with one repository in two commits."""
    folder = tmp_path / f"models--{REPOSITORY.replace('/', '--')}"
    for commit, policy in ((COMMIT, SnapKV(budget=64)), (OLDER, H2O(budget=32))):
        PolicyConfig.of(policy).save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_a_repository_and_its_revisions(hub: Path) -> None:
    given = {"cache_dir": hub, "local_files_only": True}
    assert PolicyConfig.from_pretrained(REPOSITORY, **given).policies == (SnapKV(budget=64),)
    assert PolicyConfig.from_pretrained(REPOSITORY, revision=OLDER, **given).policies == (H2O(budget=32),)


def test_without_a_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1, which the library reads when it is imported."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert PolicyConfig.from_pretrained(REPOSITORY, cache_dir=hub).policies == (SnapKV(budget=64),)


@pytest.mark.parametrize(
    ("repository", "options"),
    [("someone/else", {}), (REPOSITORY, {"revision": "3" * 40}), (REPOSITORY, {"subfolder": "deeper"})],
)
def test_what_is_not_there(hub: Path, repository: str, options: dict[str, str]) -> None:
    with pytest.raises(OSError):
        PolicyConfig.from_pretrained(repository, cache_dir=hub, local_files_only=True, **options)
    with pytest.raises(OSError, match=r"policy_config\.json is missing in"):
        PolicyConfig.from_pretrained(
            repository,
            cache_dir=hub,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **options,
        )


def test_a_damaged_file_in_a_repository(hub: Path) -> None:
    (hub / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / COMMIT / "policy_config.json").write_text("{")
    with pytest.raises(CacheFormatError, match=f"policy_config.json of '{REPOSITORY}' is damaged"):
        PolicyConfig.from_pretrained(REPOSITORY, cache_dir=hub, local_files_only=True)
