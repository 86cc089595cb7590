"""The `kvpress` command, as a user types it."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvpress import cli_mount
from kvpress.cli import app
from kvpress.cli_arguments import parse_budget, parse_settings, read_prompt
from kvpress.demo import table as demo_table
from kvpress.policies import policy_names
from kvpress.prompting import encode_prompt
from kvpress.testing.tiny_checkpoint import save_tiny_checkpoint, tiny_model, tiny_tokenizer

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def plain_answer(prompt: str, new_tokens: int) -> str:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=new_tokens, do_sample=False
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("arguments", [[], ["demo"], ["run"], ["policies"]])
def test_help_shows_examples(arguments: list[str]) -> None:
    result = runner.invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0
    assert "kvpress demo" in result.output or "Examples:" in result.output


def test_help_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\nsys.argv = ['kvpress', '--help']\nfrom kvpress.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "policies" in result.stdout


def test_the_package_can_be_run_as_a_module() -> None:
    command = [sys.executable, "-m", "kvpress"]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("kvpress-cache 0.")
    wrong = subprocess.run([*command, "demmo"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("Usage: kvpress ") and "'demo'" in wrong.stderr


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("kvpress-cache 0.")


def test_policies_lists_every_name() -> None:
    listed = json.loads(runner.invoke(app, ["policies", "--json"]).output)
    assert [row["name"] for row in listed] == policy_names()
    markdown = runner.invoke(app, ["policies", "--markdown"]).output
    table = runner.invoke(app, ["policies"]).output
    for name in policy_names():
        assert f"| `{name}` |" in markdown
        assert name in table


def test_run_with_the_full_policy_writes_what_plain_generate_writes(folder: str, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The naïve lighthouse 中", encoding="utf-8")
    expected = plain_answer("The naïve lighthouse 中", 12)
    result = runner.invoke(
        app, ["run", "-m", folder, "--prompt-file", str(prompt), "--max-new-tokens", "12", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    assert expected
    assert result.stdout == expected + "\n"
    assert "prefill" in result.stderr


def test_run_as_json_keeps_to_the_budget(folder: str) -> None:
    arguments = [
        "run",
        "-m",
        folder,
        "-p",
        "streaming_llm",
        "-b",
        "16",
        "--set",
        "sinks=2",
        "--kv-dtype",
        "int8",
        "--device",
        "cpu",
        "--json",
    ]
    result = runner.invoke(app, [*arguments, "--prompt", "word " * 30, "--max-new-tokens", "8"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["prompt_tokens"] == 150
    assert 1 <= answer["new_tokens"] <= 8
    assert answer["report"]["kv_dtype"] == "int8"
    assert answer["report"]


def test_demo_prints_a_table_and_a_verdict(folder: str) -> None:
    result = runner.invoke(
        app, ["demo", "-m", folder, "-p", "snapkv", "-p", "knorm", "--tokens", "400", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    for text in ("DynamicCache", "snapkv", "knorm", "query-agnostic", "Lose the key", "This is one prompt"):
        assert text in result.stdout


def test_demo_as_json(folder: str) -> None:
    result = runner.invoke(app, ["demo", "-m", folder, "-p", "tova", "--tokens", "400", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    demo = json.loads(result.stdout)
    assert [run["policy"] for run in demo["runs"]] == ["DynamicCache", "full", "tova", "full", "tova"]
    assert demo["budget"] == -(-demo["prompt_tokens"] // 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "snapkw", "-b", "64", "--prompt", "x"], "did you mean 'snapkv'"),
        (["-p", "snapkv", "-b", "0", "--prompt", "x"], "budget"),
        (["-p", "snapkv", "-b", "nan", "--prompt", "x"], "budget"),
        (["-p", "snapkv", "-b", "12 parsecs", "--prompt", "x"], "12 parsecs"),
        (["-p", "snapkv", "--prompt", "x"], "budget"),
        (["-p", "snapkv", "-b", "64", "--set", "windows=9", "--prompt", "x"], "windows"),
        (["-p", "snapkv", "-b", "64", "--set", "window", "--prompt", "x"], "name=value"),
        (["-p", "full"], "either as --prompt or as --prompt-file"),
        (["-p", "full", "--prompt-file", "/there/is/none"], "cannot be read"),
        (["-p", "full", "--prompt", ""], "at least one token"),
        (["-p", "full", "--prompt", "x", "--chat"], "no chat template"),
        (["-p", "full", "--prompt", "x", "--dtype", "float12"], "dtype must be one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder: str, arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["run", "-m", folder, *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_a_model_that_is_not_there_is_exit_code_1(tmp_path: Path) -> None:
    result = runner.invoke(app, ["run", "-m", str(tmp_path / "none.gguf"), "--prompt", "x"])
    assert result.exit_code == 1
    assert "none.gguf" in result.stderr


def test_a_mistyped_command_suggests_the_near_one() -> None:
    result = runner.invoke(app, ["demmo"])
    assert result.exit_code == 2
    assert "demo" in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"), [("1024", 1024), ("0.25", 0.25), ("256MB", "256MB"), ("-1", -1), ("12 parsecs", "12 parsecs")]
)
def test_budgets_are_read_as_written(text: str, expected: object) -> None:
    value = parse_budget(text)
    assert (value, type(value)) == (expected, type(expected))


def test_settings_are_read_as_json_or_text() -> None:
    assert parse_settings(["window=64", "pooling=avg", "flag=true", "text=a=b"]) == {
        "window": 64,
        "pooling": "avg",
        "flag": True,
        "text": "a=b",
    }
    with pytest.raises(ValueError, match="twice"):
        parse_settings(["window=64", "window=32"])


def test_the_prompt_comes_from_one_place(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert read_prompt("here", None) == "here"
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompt(None, tmp_path / "latin")
    with pytest.raises(ValueError, match="either"):
        read_prompt("here", tmp_path / "latin")


def test_a_mounted_app_is_imported_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli_mount.MOUNTS, "extra", cli_mount.Mount("an_extra_module:app", "Do something more."))
    shown = runner.invoke(app, ["--help"])  # the module does not exist yet, so this shows that it is not imported
    assert "Do something more." in shown.output

    module = types.ModuleType("an_extra_module")
    extra = typer.Typer()

    @extra.command()
    def first(count: int = 1) -> None:
        typer.echo("first " * count)

    @extra.command()
    def second() -> None:
        typer.echo("second")

    module.app = extra  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "an_extra_module", module)
    assert runner.invoke(app, ["extra", "first", "--count", "2"]).output == "first first \n"
    assert runner.invoke(app, ["extra", "second"]).output == "second\n"
    assert runner.invoke(app, ["extra", "third"]).exit_code == 2


def test_run_spills_to_a_folder_and_leaves_it_empty(folder: str, tmp_path: Path) -> None:
    given = ["run", "-m", folder, "--prompt", "word " * 60, "--max-new-tokens", "6", "--device", "cpu", "--json"]
    plain = json.loads(runner.invoke(app, given).stdout)
    disk = str(tmp_path / "disk")
    result = runner.invoke(app, [*given, "--offload-disk", disk, "--offload-block", "16"])
    assert result.exit_code == 0, result.output
    spilled = json.loads(result.stdout)
    assert spilled["text"] == plain["text"] and plain["report"]["tiers"] == []
    (tier,) = spilled["report"]["tiers"]
    assert tier["tier"] == "disk" and tier["limit"] is None and tier["bytes_in"] > 0 and tier["blocks"] > 8
    assert list((tmp_path / "disk").iterdir()) == []
    limited = runner.invoke(
        app, [*given, "--offload-host", "1MB", "--offload-disk", disk, "--offload-disk-limit", "2MB"]
    )
    tiers = {tier["tier"]: tier["limit"] for tier in json.loads(limited.stdout)["report"]["tiers"]}
    assert tiers == {"host": 10**6, "disk": 2 * 10**6}
    full = runner.invoke(app, [*given, "--offload-host", "1kB"])
    assert full.exit_code == 1 and full.stdout == ""
    assert full.stderr.startswith("error: ") and "has no room" in full.stderr and "Traceback" not in full.stderr


def test_demo_stores_what_policies_keep_as_asked(folder: str) -> None:
    given = ["demo", "-m", folder, "-p", "tova", "--tokens", "400", "--device", "cpu"]
    narrow = json.loads(runner.invoke(app, [*given, "--kv-dtype", "int8", "--json"]).stdout)
    wide = json.loads(runner.invoke(app, [*given, "--json"]).stdout)
    assert (wide["kv_dtype"], narrow["kv_dtype"]) == (None, "int8")
    held = [{(run["policy"], run["mode"]): run["held_bytes"] for run in demo["runs"]} for demo in (wide, narrow)]
    for run, nbytes in held[0].items():
        assert (held[1][run] < nbytes) == (run[0] == "tova")
    shown = runner.invoke(app, [*given, "--kv-dtype", "int8"])
    assert shown.exit_code == 0 and "stored as int8" in shown.stdout
    refused = runner.invoke(app, [*given, "--kv-dtype", "int7"])
    assert refused.exit_code == 2 and "kv_dtype must be" in refused.stderr


def test_the_prompt_may_come_through_a_pipe(folder: str) -> None:
    given = ["run", "-m", folder, "--prompt-file", "-", "--max-new-tokens", "12", "--device", "cpu"]
    assert runner.invoke(app, given, input="The lighthouse").stdout == plain_answer("The lighthouse", 12) + "\n"


def test_sampling_follows_the_seed(folder: str) -> None:
    given = ["run", "-m", folder, "--prompt", "The lighthouse", "--max-new-tokens", "12", "--device", "cpu"]
    sampled = [
        runner.invoke(app, [*given, "--temperature", "2", "--seed", seed]).stdout.strip() for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_prompt_in_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    expected = tokenizer("<user>Who?<answer>", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "Who?", chat=True).tolist() == [expected]


def test_a_demo_in_which_the_full_policy_answers_otherwise_failed(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_table, "full_cache_agrees", lambda result: False)
    result = runner.invoke(app, ["demo", "-m", folder, "-p", "knorm", "--tokens", "400", "--device", "cpu"])
    assert result.exit_code == 1 and "that is a fault of this package" in result.stdout
