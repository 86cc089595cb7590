"""LongBench rows become official prompts; bad rows are named; long prompts lose their middle."""

import hashlib
import json
import zipfile

import pytest

from kvpress.longbench.errors import DataError
from kvpress.longbench.prompt import PromptEncoder
from kvpress.longbench.tasks import EXTENDED_TASKS, TASKS, longbench_samples, longbench_v2_samples
from kvpress.longbench.tasks.prompts import load_prompts
from kvpress.longbench.tasks.registry import length_bucket
from kvpress.longbench.tasks.source import Source, local_source

# First 16 hex digits of the sha256 of each official prompt (dataset2prompt.json).
FINGERPRINTS = {
    "narrativeqa": "aada7ed24b06abac",
    "qasper": "0fbdd123fe7f83d6",
    "multifieldqa_en": "20b4666a2de8a1f7",
    "multifieldqa_zh": "344b3a4e557cd547",
    "hotpotqa": "9ec4ae308865bd0c",
    "2wikimqa": "9ec4ae308865bd0c",
    "musique": "9ec4ae308865bd0c",
    "dureader": "ae53329f51b17908",
    "gov_report": "91c25d585b189ced",
    "qmsum": "dca23b678fe0183b",
    "multi_news": "2af3f28c40b902e6",
    "vcsum": "3e5d8241bc9b512e",
    "trec": "0eff8bebdba99d91",
    "triviaqa": "00a802e6377e72fc",
    "samsum": "a68d884234907eef",
    "lsht": "f3edabdf7fae53d6",
    "passage_count": "986550b6c61009c6",
    "passage_retrieval_en": "39b96b7fa52bdd2a",
    "passage_retrieval_zh": "c1e2346e245eb365",
    "lcc": "6a1f24cf0bb83cd9",
    "repobench-p": "ee9ec182ea5ffeb7",
}
ANSWERS = {"passage_retrieval_en": ["Paragraph 3"], "passage_retrieval_zh": ["段落3"]}
ENDINGS = {"trec": "Type:", "triviaqa": "Answer:", "samsum": "Summary:", "lsht": "类别："}


def row(task, **changes):
    return {
        "input": f"input of {task} {{braces}} {ENDINGS.get(task, '')}".strip(),
        "context": "A {long} text.",
        "answers": ANSWERS.get(task, ["gold"]),
        "length": 4500,
        "dataset": task,
        "language": "en",
        "all_classes": ["gold", "other"],
        "_id": "x",
        **changes,
    }


def write(folder, task, rows):
    folder.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in rows)
    (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for task in TASKS:
        write(tmp_path / "lb", task, [row(task), row(task, context="Another.")])
        write(tmp_path / "lb", f"{task}_e", [row(task, length=100), row(task, length=9000)])
    return tmp_path / "lb"


def test_prompts_are_the_official_ones():
    found = {
        task: hashlib.sha256(template.text.encode()).hexdigest()[:16]
        for task, template in load_prompts().items()
        if task != "v2"
    }
    assert found == FINGERPRINTS and set(TASKS) == set(FINGERPRINTS) and len(TASKS) == 21


@pytest.mark.parametrize("task", TASKS)
def test_parts_join_to_the_official_prompt(task, folder, encoder):
    samples, skipped = longbench_samples(local_source(folder), [task], encoder, max_length=10_000)
    assert len(samples) == 2 and not skipped
    sample, rule = samples[0], TASKS[task]
    assert sample.text == load_prompts()[task].text.format(**row(task))
    assert "A {long} text." in sample.context and row(task)["input"] not in sample.context
    assert sample.answer_prefix
    if task in ENDINGS:
        assert sample.answer_prefix == ENDINGS[task] and sample.details["first_line"]
    assert sample.max_new_tokens == rule.max_new_tokens and sample.groups == (task, "average")


def test_exceptions_of_the_official_code():
    assert {task for task, rule in TASKS.items() if not rule.chat} == {*ENDINGS, "lcc", "repobench-p"}
    assert {task for task, rule in TASKS.items() if rule.stop_at_newline} == {"samsum"}
    limits = {task: rule.max_new_tokens for task, rule in TASKS.items()}
    assert {task for task, limit in limits.items() if limit == 512} == {"gov_report", "qmsum", "multi_news", "vcsum"}
    assert {task for task, limit in limits.items() if limit == 128} == {"narrativeqa", "qasper", "dureader", "samsum"}


def test_extended_adds_length_buckets(folder, encoder):
    assert len(EXTENDED_TASKS) == 13
    assert [length_bucket(n) for n in (0, 3999, 4000, 7999, 8000)] == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+"]
    samples, _ = longbench_samples(local_source(folder), ["qasper"], encoder, max_length=10_000, extended=True)
    assert [sample.groups[1] for sample in samples] == ["qasper/0-4k", "qasper/8k+"]
    with pytest.raises(ValueError, match="task must be one of"):
        longbench_samples(local_source(folder), ["narrativeqa"], encoder, max_length=10, extended=True)


def test_archive_equals_folder(folder, tmp_path, encoder):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as target:
        target.write(folder / "trec.jsonl", "data/trec.jsonl")
    assert longbench_samples(Source(archive), ["trec"], encoder, max_length=900) == longbench_samples(
        Source(folder), ["trec"], encoder, max_length=900
    )


@pytest.mark.parametrize(
    ("task", "line", "reason"),
    [
        ("qasper", "{broken", "not JSON"),
        ("qasper", "[1]", "not a JSON object"),
        ("qasper", {"input": "", "context": "c", "length": 3}, "'answers' is missing"),
        ("qasper", row("qasper", answers=[]), "'answers' must hold at least one"),
        ("qasper", row("qasper", answers=[""]), "'answers' must hold at least one"),
        ("qasper", row("qasper", context=None), "'context' must not be NoneType"),
        ("trec", row("trec", all_classes=None), "'all_classes' must hold the classes"),
        ("passage_retrieval_en", row("passage_retrieval_en", answers=["3"]), "must read 'Paragraph '"),
    ],
)
def test_bad_rows_are_named_and_the_rest_goes_on(task, line, reason, tmp_path, encoder):
    write(tmp_path, task, [row(task), line, "", row(task)])
    samples, skipped = longbench_samples(local_source(tmp_path), [task], encoder, max_length=900)
    assert [sample.details["line"] for sample in samples] == [1, 4]
    assert len(skipped) == 1 and skipped[0].line == 2 and reason in skipped[0].reason
    assert str(skipped[0]).startswith(f"{tmp_path / task}.jsonl:2: ")


def test_missing_files(tmp_path, encoder):
    _, skipped = longbench_samples(local_source(tmp_path), ["lcc"], encoder, max_length=900)
    assert "no such file" in str(skipped[0])
    with pytest.raises(DataError, match="no such folder"):
        local_source(tmp_path / "nowhere")


def test_middle_truncation_keeps_both_ends(tmp_path, encoder, tokenizer):
    text = " ".join(f"word{number}" for number in range(400))
    write(tmp_path, "qasper", [row("qasper", context=text)])
    (whole,), _ = longbench_samples(local_source(tmp_path), ["qasper"], encoder, max_length=100_000)
    (cut,), _ = longbench_samples(local_source(tmp_path), ["qasper"], encoder, max_length=901)
    ids = tokenizer(whole.text)["input_ids"]
    assert len(ids) > 1000
    assert cut.text == tokenizer.decode(ids[:450]) + tokenizer.decode(ids[-450:])
    assert (cut.question, cut.answer_prefix) == (whole.question, whole.answer_prefix)
    assert cut.details["truncated_from"] == len(ids) and "truncated_from" not in whole.details
    (tiny,), _ = longbench_samples(local_source(tmp_path), ["qasper"], encoder, max_length=10)
    assert tiny.text == tokenizer.decode(ids[:5]) + tokenizer.decode(ids[-5:])


def test_chat_template_wraps_all_but_the_exceptions(folder, tokenizer):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}<U>{{ m.content }}</U>{% endfor %}<A>"
    encoder = PromptEncoder(chatty, chat=True)
    samples, _ = longbench_samples(local_source(folder), ["qasper", "lcc"], encoder, max_length=10_000, limit=1)
    qasper, lcc = (chatty.decode(encoder.encode(sample).ids) for sample in samples)
    assert qasper == "<U>" + samples[0].context + samples[0].question + "</U><A>Answer:"
    assert lcc == samples[1].text
    with pytest.raises(ValueError, match="chat template, and this one has none"):
        PromptEncoder(tokenizer, chat=True)


def v2_row(**changes):
    return {
        "_id": "a",
        "domain": "d",
        "sub_domain": "s",
        "difficulty": "easy",
        "length": "short",
        "question": " Q? ",
        "choice_A": "one",
        "choice_B": "two $Q$",
        "choice_C": "three",
        "choice_D": "four",
        "answer": "B",
        "context": " Text with $C_A$ in it. ",
        **changes,
    }


def test_version_2(tmp_path, encoder):
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps([v2_row(), v2_row(_id="b", answer="E"), v2_row(_id="c", difficulty="hard", context=None)])
    )
    (sample,), skipped = longbench_v2_samples(tmp_path, encoder, max_length=5000)
    assert sample.text == (
        "Please read the following text and answer the question below.\n\n<text>\nText with $C_A$ in it.\n</text>\n\n"
        "What is the correct answer to this question: Q?\nChoices:\n(A) one\n(B) two $Q$\n(C) three\n(D) four\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert sample.groups == ("overall", "easy", "short") and sample.references == ("B",)
    assert [entry.line for entry in skipped] == [2, 3] and "'answer' must be one of A, B, C, D" in skipped[0].reason
    path.write_text("{}")
    with pytest.raises(DataError, match="must hold a JSON list"):
        longbench_v2_samples(path, encoder, max_length=5000)


def test_replaced_prompts(tmp_path, folder, encoder):
    path = tmp_path / "prompts.json"
    parts = {"context": "C {context}", "question": "Q {input}", "answer_prefix": "A"}
    path.write_text(json.dumps({"prompts": {"lcc": parts}, "v2": {**parts, "context": "$DOC$"}}))
    (sample,), _ = longbench_samples(local_source(folder), ["lcc"], encoder, max_length=900, limit=1, prompts=path)
    assert sample.context == "C A {long} text."
    path.write_text(json.dumps({"prompts": {"lcc": {**parts, "context": "nothing"}}, "v2": parts}))
    with pytest.raises(DataError, match="the context of 'lcc' has no place"):
        load_prompts(path)
