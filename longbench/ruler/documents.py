"""Questions over documents: SQuAD and HotpotQA files in their official JSON, for `qa_1` and `qa_2`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError


@dataclass(frozen=True)
class DocumentQuestion:
    """A question, its accepted answers, the documents that answer it, and those that are used next (same article)."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class DocumentSet:
    """Documents (sorted, unique) and questions about them; `name` tells real data from the synthetic stand-in."""

    name: str
    documents: tuple[str, ...]
    questions: tuple[DocumentQuestion, ...]


def read_squad(path: Path) -> DocumentSet:
    """SQuAD 2.0 (`dev-v2.0.json`): the answerable questions.

    Raises:
        DataError: not JSON, or a field of the format is missing; names the file and the article.
    """
    articles = _field(path, _load(path), "data", "the file")
    paragraphs: list[list[str]] = []
    raw: list[tuple[int, str, str, tuple[str, ...]]] = []
    for number, article in enumerate(articles):
        where = f"data[{number}]"
        entries = _field(path, article, "paragraphs", where)
        paragraphs.append([_field(path, entry, "context", where) for entry in entries])
        for entry in entries:
            for question in _field(path, entry, "qas", where):
                answers = tuple(_field(path, answer, "text", where) for answer in question.get("answers", []))
                if answers and not question.get("is_impossible", False):
                    raw.append((number, entry["context"], _field(path, question, "question", where), answers))
    documents = sorted({text for article in paragraphs for text in article})
    index = {text: position for position, text in enumerate(documents)}
    questions = [
        DocumentQuestion(
            query,
            answers,
            (index[context],),
            tuple(dict.fromkeys(index[text] for text in paragraphs[number] if text != context)),
        )
        for number, context, query, answers in raw
    ]
    return _checked(path, DocumentSet("SQuAD", tuple(documents), tuple(questions)))


def read_hotpotqa(path: Path) -> DocumentSet:
    """HotpotQA (`hotpot_dev_distractor_v1.json`): every question brings its ten paragraphs.

    Raises:
        DataError: not JSON, or a field of the format is missing; names the file and the question.
    """
    rows = _load(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: HotpotQA must be a JSON list of questions, not {type(rows).__name__}")
    texts: list[list[str]] = []
    for number, row in enumerate(rows):
        try:
            texts.append([f"{title}\n{''.join(lines)}" for title, lines in _field(path, row, "context", f"[{number}]")])
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: [{number}].context must be a list of [title, [sentences]]") from error
    documents = sorted({text for paragraphs in texts for text in paragraphs})
    index = {text: position for position, text in enumerate(documents)}
    questions = [
        DocumentQuestion(
            _field(path, row, "question", f"[{number}]"),
            (_field(path, row, "answer", f"[{number}]"),),
            tuple(dict.fromkeys(index[text] for text in paragraphs)),
        )
        for number, (row, paragraphs) in enumerate(zip(rows, texts, strict=True))
    ]
    return _checked(path, DocumentSet("HotpotQA", tuple(documents), tuple(questions)))


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _field(path: Path, value: Any, name: str, where: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise DataError(f"{path}: the field {name!r} is missing in {where}")
    return value[name]


def _checked(path: Path, documents: DocumentSet) -> DocumentSet:
    if not documents.questions:
        raise DataError(f"{path}: no answerable question found")
    return documents
