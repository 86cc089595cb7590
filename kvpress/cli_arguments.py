"""Values as they are written on a command line."""

import json
from pathlib import Path
from typing import Any


def parse_budget(text: str) -> int | float | str:
    """`1024` is tokens, `0.25` a share of the prompt, anything else text like `256MB`. The policy checks it."""
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def parse_settings(settings: list[str], field: str = "set") -> dict[str, Any]:
    """`["window=64", "pooling=avg"]` as parameters; a value is read as JSON, and taken as text where it is not JSON.

    Raises:
        ValueError: an item without `=`, or a name given twice; names `field`.
    """
    parameters: dict[str, Any] = {}
    for item in settings:
        name, equals, text = item.partition("=")
        if not (name and equals):
            raise ValueError(f"{field} must be written as name=value, got {item!r}")
        if name in parameters:
            raise ValueError(f"{field} must give each name once, {name!r} comes twice")
        try:
            parameters[name] = json.loads(text)
        except json.JSONDecodeError:
            parameters[name] = text
    return parameters


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from the option or from the file; `-` reads standard input.

    Raises:
        ValueError: none or both are given, or the file cannot be read as UTF-8 text.
    """
    if (prompt is None) == (prompt_file is None):
        raise ValueError("prompt must be given either as --prompt or as --prompt-file")
    if prompt is not None:
        return prompt
    if str(prompt_file) == "-":
        import sys

        return sys.stdin.read()
    try:
        return Path(str(prompt_file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt-file {str(prompt_file)!r} cannot be read: {error}") from error
