"""A model of the hub: asked for once, and refused at once where the hub cannot be reached."""

import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from kvpress.models import ModelLoadError, load_model
from kvpress.models.hub import check_reachable
from kvpress.profiling.configuration import load_config


def ask_at(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:  # a port that nobody listens at afterwards
        endpoint = f"http://127.0.0.1:{closed.server_port}"
    ask_at(endpoint, tmp_path, monkeypatch)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What a hub that knows no model was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            paths.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        ask_at(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
        yield paths
        server.shutdown()


@pytest.mark.parametrize("load", [load_model, load_config])
@pytest.mark.usefixtures("unreachable")
def test_a_model_of_an_unreachable_hub_is_refused_after_one_try(
    load: Callable[[str], object], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelLoadError, match=r"'nowhere' is not in the hub's cache folder.*cannot be reached.*smollm2"):
        load("nowhere")
    assert "Retrying" not in capfd.readouterr().err


@pytest.mark.usefixtures("unreachable")
def test_a_model_in_the_cache_folder_needs_no_hub(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--known"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    (repository / "snapshots" / ("1" * 40)).mkdir(parents=True)
    with pytest.raises(ModelLoadError):
        check_reachable("org/known")  # the file is not there
    (repository / "snapshots" / ("1" * 40) / "config.json").write_text("{}")
    check_reachable("org/known")


def test_what_the_hub_answers_is_left_to_the_loader(asked: list[str]) -> None:
    check_reachable("org/unknown")
    assert asked == ["/org/unknown/resolve/main/config.json"]


def test_a_name_that_no_hub_can_have_is_left_to_the_loader() -> None:
    check_reachable("a b")
    with pytest.raises(ModelLoadError, match=re.escape("'a b' could not be loaded")):
        load_model("a b")
