"""LongBench's prompts, split into context, question and answer prefix; a user's own file may replace them."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..errors import DataError

_PARTS = ("context", "question", "answer_prefix")


@dataclass(frozen=True)
class PromptTemplate:
    """Three templates; their concatenation is the benchmark's prompt. `context` holds the long text's place."""

    context: str
    question: str
    answer_prefix: str

    @property
    def text(self) -> str:
        return self.context + self.question + self.answer_prefix


def load_prompts(path: Path | None = None) -> dict[str, PromptTemplate]:
    """Templates of version 1 by task name, and "v2"; from `path` (same layout) or the official ones.

    Raises:
        DataError: not JSON, or a part is missing; names the file and the task.
    """
    name = str(path) if path else "prompts.json"
    try:
        text = (path or resources.files(__package__).joinpath("prompts.json")).read_text(encoding="utf-8")
        data = json.loads(text)
        templates = {**data["prompts"], "v2": data["v2"]}
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno}: not JSON ({error.msg})") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{name}: needs the objects 'prompts' and 'v2'") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error})") from error
    for task, parts in templates.items():
        if not isinstance(parts, dict) or not all(isinstance(parts.get(part), str) for part in _PARTS):
            raise DataError(f"{name}: the prompt of {task!r} needs the texts {', '.join(_PARTS)}")
        if ("$DOC$" if task == "v2" else "{context}") not in parts["context"]:
            raise DataError(f"{name}: the context of {task!r} has no place for the long text")
    return {task: PromptTemplate(*(parts[part] for part in _PARTS)) for task, parts in templates.items()}
