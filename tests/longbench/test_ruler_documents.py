"""SQuAD and HotpotQA files, and what happens to broken ones."""

import json

import pytest

from kvpress.longbench.errors import DataError
from kvpress.longbench.ruler import RulerData, ruler_samples
from kvpress.longbench.ruler.documents import read_hotpotqa, read_squad


def squad():
    def question(name, *, impossible=False):
        return {"question": f"Who is {name}?", "is_impossible": impossible, "answers": [{"text": name}]}

    return {
        "data": [
            {
                "paragraphs": [
                    {"context": "Ada wrote.", "qas": [question("Ada"), question("Nobody", impossible=True)]},
                    {"context": "Bob sang.", "qas": [question("Bob")]},
                ]
            },
            {
                "paragraphs": [
                    {"context": f"Filler {number} walked home in the rain.", "qas": []} for number in range(60)
                ]
            },
        ]
    }


def hotpotqa():
    return [
        {
            "question": f"Q{n}?",
            "answer": f"answer{n:03}",
            "context": [[f"T{n}", [f"It was answer{n:03}.", " Truly."]], [f"U{n}", ["Else."]]],
        }
        for n in range(30)
    ]


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_squad_keeps_answerable_questions_and_knows_the_article(tmp_path):
    data = read_squad(write(tmp_path / "squad.json", squad()))
    assert [question.query for question in data.questions] == ["Who is Ada?", "Who is Bob?"]
    assert len(data.documents) == 62 and list(data.documents) == sorted(data.documents)
    first = data.questions[0]
    assert [data.documents[number] for number in first.gold] == ["Ada wrote."]
    assert [data.documents[number] for number in first.related] == ["Bob sang."]


def test_hotpotqa_keeps_titles_and_all_paragraphs(tmp_path):
    data = read_hotpotqa(write(tmp_path / "hotpot.json", hotpotqa()))
    assert {data.documents[number] for number in data.questions[3].gold} == {
        "T3\nIt was answer003. Truly.",
        "U3\nElse.",
    }


@pytest.mark.parametrize(("task", "field", "content"), [("qa_1", "squad", squad()), ("qa_2", "hotpotqa", hotpotqa())])
def test_samples_hold_gold_documents_once(task, field, content, tmp_path, encoder):
    data = RulerData(**{field: write(tmp_path / "data.json", content)})
    for sample in ruler_samples(task, 900, 2, encoder, data=data):
        assert sample.context.count(sample.references[0]) == 1
        assert sample.context.count("Document ") == sample.details["documents"] > 5
        assert sample.details["data"] != "synthetic documents"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n  broken", r"data\.json:2: not JSON"),
        ({"rows": []}, r"data\.json: the field 'data' is missing in the file"),
        ({"data": [{"title": "x"}]}, r"'paragraphs' is missing in data\[0\]"),
        ({"data": []}, "no answerable question"),
    ],
)
def test_broken_squad_names_file_and_place(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_squad(write(tmp_path / "data.json", content))


def test_broken_hotpotqa(tmp_path):
    with pytest.raises(DataError, match=r"'answer' is missing in \[0\]"):
        read_hotpotqa(write(tmp_path / "data.json", [{"question": "?", "context": [["t", ["s"]]]}]))
    with pytest.raises(DataError, match=r"\[0\]\.context must be a list"):
        read_hotpotqa(write(tmp_path / "data.json", [{"question": "?", "answer": "a", "context": [1]}]))


def test_too_many_samples_asked(tmp_path, encoder):
    data = RulerData(squad=write(tmp_path / "data.json", squad()))
    with pytest.raises(DataError, match="SQuAD holds 2 questions; sample 3 was asked for"):
        ruler_samples("qa_1", 900, 3, encoder, data=data)
