"""Every generator against RULER's rules: length, needles, depths, answers, determinism."""

import re
from collections import Counter

import pytest

from kvpress.longbench.ruler import TASKS, ruler_samples
from kvpress.longbench.ruler.haystack import DEPTHS, NOISE, Prose, hide_in_prose
from kvpress.longbench.ruler.niah import NIAH_TASKS

LENGTH = 3000
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")


@pytest.fixture(scope="module")
def drawn(encoder):
    return {task: ruler_samples(task, LENGTH, 3, encoder, seed=7) for task in TASKS}


def test_thirteen_tasks():
    assert len(TASKS) == 13
    limits = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert {task: rule.max_new_tokens for task, rule in TASKS.items()} == {**dict.fromkeys(NIAH_TASKS, 128), **limits}
    assert {task for task, rule in TASKS.items() if rule.metric == "string_match_part"} == {"qa_1", "qa_2"}


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_output_limit_fit_and_fill_the_length(task, drawn, encoder):
    for sample in drawn[task]:
        total = encoder.length(sample) + sample.max_new_tokens
        assert total <= LENGTH
        # What one step down may leave empty: a few lines, documents or dozens of words.
        assert total > 0.8 * LENGTH
        assert encoder.length(sample) == len(encoder.encode(sample).ids)


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_stands_in_the_context_and_not_in_the_question(task, drawn):
    for sample in drawn[task]:
        assert sample.references
        for answer in sample.references:
            assert answer in sample.context
            assert answer not in sample.question + sample.answer_prefix


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_samples_and_prefix_stable(task, drawn, encoder):
    again = ruler_samples(task, LENGTH, 2, encoder, seed=7)
    assert again == drawn[task][:2]
    other = ruler_samples(task, LENGTH, 1, encoder, seed=8)
    assert other[0].text != drawn[task][0].text
    assert len({sample.text for sample in drawn[task]}) == 3
    assert len({sample.sample_id for sample in drawn[task]}) == 3


@pytest.mark.parametrize("task", NIAH_TASKS)
def test_needles_and_questions(task, drawn):
    rule = NIAH_TASKS[task]
    for sample in drawn[task]:
        found = NEEDLE.findall(sample.context)
        hidden = [NEEDLE.fullmatch(needle).groups() for needle in sample.details["needles"]]
        assert len(hidden) == max(rule.keys, rule.queries) * rule.values
        assert Counter(hidden) <= Counter(found)
        assert (len(found) > len(hidden)) == (rule.haystack == "needle")
        asked = {key for _, key, _ in hidden if key in sample.question}
        assert len(asked) == rule.queries
        assert set(sample.references) == {value for _, key, value in hidden if key in asked}
        assert all(key in sample.answer_prefix for key in asked)
        pattern = r"[1-9]\d{6}" if rule.value == "numbers" else r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab].*"
        assert all(re.fullmatch(pattern, value) for _, _, value in hidden)
        plural = len(sample.references) > 1
        assert ("What are all the" in sample.question) == plural
        assert sample.answer_prefix.endswith("are" if plural else "is")


def test_prose_depths_are_rulers_and_distinct(drawn):
    assert len(DEPTHS) == len(set(DEPTHS)) == 40 and (DEPTHS[0], DEPTHS[-1]) == (0, 100)
    for sample in drawn["niah_multiquery"]:
        depths = sample.details["depths"]
        assert len(set(depths)) == 4 and set(depths) <= set(DEPTHS)
        order = [sample.context.index(needle) for needle in sample.details["needles"]]
        assert order == sorted(order)


def test_needle_is_placed_at_its_depth():
    text = " ".join(f"Sentence number {number} here." for number in range(100))
    for depth, before in ((0, 0), (50, 50), (100, 100)):
        words = hide_in_prose(text, ["NEEDLE."], [depth])
        assert words[: words.index("NEEDLE.")].count("Sentence") == before


def test_all_samples_share_the_same_prose(drawn):
    first, second = (NEEDLE.sub("", sample.context).split() for sample in drawn["niah_single_2"][:2])
    shared = min(len(first), len(second))
    assert shared > 300 and first[:shared] == second[:shared]


def test_prose_never_repeats_a_sentence():
    parts = re.split(r"(?<=\.) ", Prose(seed=3).text(20_000))
    assert len(parts) > 1000 and len(set(parts)) == len(parts)


def test_a_short_file_is_repeated(tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text("One two.\nThree   four.\n")
    assert Prose(path).text(6) == "One two. Three four. One two."


def test_variable_tracking_chain(drawn):
    for sample in drawn["vt"]:
        example, real = sample.context.split("\n\nMemorize", 1)
        assert example.count("VAR ") == 9 and real.count("VAR ") == 9
        statements = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\S+)", real)
        assert statements[0][1] == sample.details["value"]
        assert [name for name, _ in statements] == list(sample.references)
        assert [source for _, source in statements[1:]] == list(sample.references[:-1])
        assert sample.details["value"] in sample.question
        assert "5 variables" in sample.answer_prefix
        assert NOISE in real
        solved = example.rpartition("they are: ")[2].split()
        assert len(solved) == 5 and all(re.fullmatch("[A-Z]{3}", name) for name in solved)
    assert len({sample.context[:400] for sample in drawn["vt"]}) == 3


def test_variable_tracking_example_is_fitted_to_500_tokens(drawn, tokenizer):
    example = drawn["vt"][0].context.split("\n\nMemorize", 1)[0]
    assert (
        400 < len(tokenizer(example)["input_ids"]) < 520
    )  # fitted once; other names may cost a few tokens more or less


@pytest.mark.parametrize(("length", "common", "uncommon"), [(3000, 6, 1), (6000, 30, 3)])
def test_common_words_counts(length, common, uncommon, encoder):
    (sample,) = ruler_samples("cwe", length, 1, encoder)
    listing = sample.context.rpartition("\n1. ")[2]
    counts = Counter(re.findall(r"(?:^|\d+\. )(.+?)(?= \d+\. |\n$)", listing))
    assert {counts[word] for word in sample.references} == {common}
    assert len(sample.references) == 10
    assert {count for word, count in counts.items() if word not in sample.references} == {uncommon}
    example = sample.context.partition("\nBelow is")[0]
    assert len(re.findall(r"\d+\. ", example)) == (3 * 10 + 10 if length < 4096 else 10 * 10 + 30 * 3) + 10


def test_frequent_words_follow_zipf(drawn):
    for sample in drawn["fwe"]:
        words = sample.context.rpartition("coded words. ")[2].split()
        ranked = Counter(words).most_common()
        assert ranked[0][0] == "..."
        assert [word for word, _ in ranked[1:4]] == list(sample.references)
        assert ranked[0][1] / ranked[1][1] == pytest.approx(4, rel=0.05)


def test_stand_in_is_named(drawn):
    for task in ("qa_1", "qa_2"):
        for sample in drawn[task]:
            assert sample.details["data"] == "synthetic documents"
            assert sample.context.count("Document ") == sample.details["documents"] > 20


def test_bad_arguments(encoder):
    with pytest.raises(ValueError, match="task must be one of niah_single_1"):
        ruler_samples("niah", LENGTH, 1, encoder)
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        ruler_samples("vt", LENGTH, 0, encoder)
    with pytest.raises(ValueError, match="vt does not fit in 200 tokens"):
        ruler_samples("vt", 200, 1, encoder)
