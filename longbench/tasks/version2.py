"""LongBench v2 (https://arxiv.org/abs/2412.15204): 503 questions with four choices, over texts of up to 2M words."""

import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..prompt import PromptEncoder
from ..sample import Sample, Skipped
from .prompts import PromptTemplate, load_prompts
from .rows import problem, read_rows

HUB_ID = "THUDM/LongBench-v2"
HUB_FILE = "data.json"
MAX_NEW_TOKENS = 128
_TEXTS = (
    "_id",
    "context",
    "question",
    "choice_A",
    "choice_B",
    "choice_C",
    "choice_D",
    "answer",
    "difficulty",
    "length",
)
_LEVELS = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long"), "answer": ("A", "B", "C", "D")}


def longbench_v2_samples(
    path: Path, encoder: PromptEncoder, *, max_length: int, limit: int | None = None, prompts: Path | None = None
) -> tuple[list[Sample], list[Skipped]]:
    """Samples of `data.json` (one list) or of a file of JSON lines, without chain of thought, and the rows left out.

    Averages: overall, easy, hard, short, medium, long.

    Raises:
        DataError: the file cannot be read, or is neither JSON nor JSON lines.
    """
    template = load_prompts(prompts)["v2"]
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for row in _rows(path):
        if len(samples) == limit:
            break
        made = row if isinstance(row, Skipped) else _sample(path, *row, template)
        if isinstance(made, Skipped):
            skipped.append(made)
        else:
            samples.append(encoder.truncate_middle(made, max_length))
    return samples, skipped


def _rows(path: Path) -> list[tuple[int, dict[str, Any]] | Skipped]:
    if path.is_dir():
        path = path / HUB_FILE
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        return list(read_rows(path))
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold a JSON list of questions, not {type(rows).__name__}")
    return [
        (number, row) if isinstance(row, dict) else Skipped(str(path), number, "not a JSON object")
        for number, row in enumerate(rows, start=1)
    ]


def _sample(path: Path, number: int, row: dict[str, Any], template: PromptTemplate) -> Sample | Skipped:
    wrong = problem(row, dict.fromkeys(_TEXTS, str))
    for field, allowed in _LEVELS.items():
        if not wrong and row[field] not in allowed:
            wrong = f"the field {field!r} must be one of {', '.join(allowed)}, not {row[field]!r}"
    if wrong:
        return Skipped(str(path), number, wrong)
    marks = {"$DOC$": "context", "$Q$": "question", **{f"$C_{letter}$": f"choice_{letter}" for letter in "ABCD"}}

    def fill(text: str) -> str:
        # One mark at a time from the left, so that a mark inside a document stays text.
        for mark, field in marks.items():
            head, found, tail = text.partition(mark)
            if found:
                return fill(head) + str(row[field]).strip() + fill(tail)
        return text

    return Sample(
        "longbench-v2",
        f"longbench-v2/{row['_id']}",
        fill(template.context),
        fill(template.question),
        fill(template.answer_prefix),
        (row["answer"],),
        "choice",
        MAX_NEW_TOKENS,
        ("overall", row["difficulty"], row["length"]),
        {"row": number},
    )
