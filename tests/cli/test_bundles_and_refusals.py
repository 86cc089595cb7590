"""Options written once for several commands, and how a command ends that cannot do what was asked."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from kvpress.cli_bundles import bundled
from kvpress.cli_options import Storage
from kvpress.cli_refusals import refusals
from kvpress.errors import UnsupportedModelError
from kvpress.longbench.errors import MissingExtraError
from kvpress.models.errors import ModelLoadError
from kvpress.offload import Offload, TierFullError

runner = CliRunner()


@dataclass(frozen=True)
class Lamp:
    panel: ClassVar[str] = "The lamp"

    height: Annotated[int, typer.Option("--height", "-H", min=1, help="In metres.")]
    colour: Annotated[str | None, typer.Option(help="Of the light.")] = None


@dataclass(frozen=True)
class Keeper:
    name: Annotated[str, typer.Option()] = "Ann"


def made(seen: list[object]) -> typer.Typer:
    app = typer.Typer(rich_markup_mode="markdown")

    @app.command()
    @bundled
    def light(*, lamp: Lamp = Lamp(30), keeper: Keeper, times: int = 1) -> None:
        """Light the lamp."""
        seen.extend([lamp, keeper, times])

    return app


def test_the_fields_of_a_dataclass_become_options() -> None:
    seen: list[object] = []
    assert runner.invoke(made(seen), ["-H", "7", "--colour", "red", "--times", "2"]).exit_code == 0
    assert seen == [Lamp(7, "red"), Keeper("Ann"), 2]
    assert runner.invoke(made(seen), ["--name", "Bo"]).exit_code == 0
    assert seen[3:] == [Lamp(30, None), Keeper("Bo"), 1]  # the default instance's height
    shown = runner.invoke(made([]), ["--help"]).output
    assert "Light the lamp." in shown and "The lamp" in shown and "In metres." in shown
    assert runner.invoke(made([]), ["-H", "0"]).exit_code == 2
    assert Lamp.__annotations__["height"].__metadata__[0].rich_help_panel is None  # the dataclass is as it was


def test_a_field_without_a_default_must_be_given() -> None:
    app, seen = typer.Typer(), list[Lamp]()

    @app.command()
    @bundled
    def light(*, lamp: Lamp) -> None:
        seen.append(lamp)

    result = runner.invoke(app, [])
    assert result.exit_code == 2 and "--height" in result.output and not seen


def test_two_options_of_one_name_are_refused() -> None:
    def light(*, lamp: Lamp, height: int = 3) -> None: ...

    with pytest.raises(TypeError, match="'height' comes twice"):
        bundled(light)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("budget must be more"), 2, "error: budget must be more"),
        (TypeError("a job must be a job"), 2, "error: a job must be a job"),
        (MissingExtraError("needs the library 'x'"), 2, "error: needs the library 'x'"),
        (ModelLoadError("no such model"), 1, "error: no such model"),
        (TierFullError("host", "has no room"), 1, "error: host tier: has no room"),
        (PermissionError(13, "Permission denied", "/out"), 1, "error: '/out': Permission denied"),
        (OSError("no space left"), 1, "error: no space left"),
        (KeyboardInterrupt(), 130, "goes on from here"),
    ],
)
def test_exit_codes(error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, refusals(stopped="goes on from here"):
        raise error
    assert caught.value.exit_code == code
    assert capsys.readouterr().err.strip() == told


def test_a_fault_keeps_its_trace() -> None:
    with pytest.raises(RuntimeError, match="a fault"), refusals():
        raise RuntimeError("a fault")
    for fault in (ValueError("a fault"), OSError("a fault")):
        with pytest.raises(type(fault), match="a fault"), refusals(UnsupportedModelError):
            raise fault
    with pytest.raises(typer.Exit), refusals(UnsupportedModelError):
        raise UnsupportedModelError("no such attention")


def test_storage_options_are_those_of_a_cache() -> None:
    assert Storage().arguments() == {"kv_dtype": None, "offload": None}
    assert Storage(kv_dtype="int8").arguments() == {"kv_dtype": "int8", "offload": None}
    given = Storage(offload_device="1kB", offload_host="2MB", offload_disk="/data", offload_disk_limit="3GiB")
    assert given.arguments()["offload"] == Offload(1000, 2 * 10**6, "/data", 3 * 2**30)


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        (Storage(kv_dtype="int7"), "kv_dtype must be None or one of"),
        (Storage(offload_host="12XB"), "offload-host must be bytes with a unit"),
        (Storage(offload_disk_limit="x", offload_disk="y"), "offload-disk-limit must be bytes with a unit"),
        (Storage(offload_disk_limit="1MB"), "offload-disk-limit needs offload-disk"),
        (Storage(offload_block=8), "offload-block needs offload-device, offload-host or offload-disk"),
        (Storage(offload_disk=""), "disk must be the path of a directory"),
    ],
)
def test_wrong_storage_options_name_themselves(storage: Storage, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        storage.arguments()
