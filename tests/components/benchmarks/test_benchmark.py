"""Scoring against values worked out by hand."""

import pytest

from components.benchmarks import Benchmark, Question, exact_match, normalize, text_only_best

QUESTIONS = [
    Question("1", "how many", ("a",), "2", "count"),
    Question("2", "how many", ("b",), "2", "count"),
    Question("3", "how many", ("c",), "3", "count"),
    Question("4", "is there a dog", ("a",), "Yes", "existence"),
    Question("5", "is there a cat", ("a",), "no", "existence"),
]


class Five(Benchmark):
    def setup(self): ...

    def questions(self):
        return QUESTIONS

    def read_image(self, name):
        return name.encode()

    def describe(self):
        return "five questions"


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        (" yes.\n", "yes"),
        ("yes .", "yes"),
        ("a dog", "a dog"),
        ("3.5", "3.5"),
        ("", ""),
        ("..", "."),
        ("yes!", "yes!"),
    ],
)
def test_only_space_case_and_one_final_period_do_not_count(answer, normal):
    assert normalize(answer) == normal


def test_scores_by_hand():
    answers = {"1": "2.", "2": "two", "3": "3", "4": " yes", "5": "yes"}
    assert Five().score(answers) == {"accuracy": 3 / 5, "accuracy/count": 2 / 3, "accuracy/existence": 1 / 2, "count": 5.0}


def test_a_part_of_the_questions_is_scored_over_that_part():
    assert Five().score({"3": "3", "5": "yes"}) == {
        "accuracy": 1 / 2,
        "accuracy/count": 1.0,
        "accuracy/existence": 0.0,
        "count": 2.0,
    }


def test_an_answer_without_question_is_refused():
    with pytest.raises(ValueError, match="five questions has no question '6'"):
        Five().score({"1": "2", "6": "2"})


def test_nothing_answered_has_no_score():
    with pytest.raises(ValueError, match="no answers"):
        exact_match([], {})


def test_questions_without_group_count_in_the_whole_only():
    assert exact_match([Question("1", "p", (), "x")], {"1": "X"}) == {"accuracy": 1.0, "count": 1.0}


def test_text_only_best_is_the_majority_of_each_prompt():
    # "how many": 2 is right twice of three; each of the other two prompts has one answer
    assert text_only_best(QUESTIONS) == {"accuracy": 4 / 5, "accuracy/count": 2 / 3, "accuracy/existence": 1.0, "count": 5.0}


def test_text_only_best_counts_spellings_that_score_alike_together():
    prompt_of = [Question(str(i), "p", (), reference) for i, reference in enumerate(["yes", "Yes", "yes.", "no", "no"])]
    assert text_only_best(prompt_of)["accuracy"] == 3 / 5


def test_text_only_best_knows_the_prompt_but_not_the_group():
    mixed = [Question("1", "p", (), "x", "a"), Question("2", "p", (), "x", "a"), Question("3", "p", (), "y", "b")]
    assert text_only_best(mixed) == {"accuracy": 2 / 3, "accuracy/a": 1.0, "accuracy/b": 0.0, "count": 3.0}


def test_fingerprint_follows_every_field(monkeypatch):
    fingerprints = {Five().fingerprint()}
    for change in ({"id": "7"}, {"prompt": "how much"}, {"images": ("b",)}, {"reference": "4"}, {"group": "size"}):
        changed = Question(**{**vars(QUESTIONS[0]), **change})
        monkeypatch.setattr(Five, "questions", lambda self, changed=changed: [changed, *QUESTIONS[1:]])
        fingerprints.add(Five().fingerprint())
    assert len(fingerprints) == 6
