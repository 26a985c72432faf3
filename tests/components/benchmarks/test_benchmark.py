"""Scoring against values worked out by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from components.benchmarks import Benchmark, Question, text_only_best
from components.errors import RecipeError

ROOT = Path(__file__).parents[3]
QUESTIONS = [
    Question("1", "how many", ("a",), "2", "count"),
    Question("2", "how many", ("b",), "2", "count"),
    Question("3", "how many", ("c",), "3", "count"),
    Question("4", "is there a dog", ("a",), "Yes", "existence"),
    Question("5", "is there a cat", ("a",), "no", "existence"),
]


class Five(Benchmark):
    def setup(self, pictures=True): ...

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
    assert Five().normalize(answer) == normal


def test_scores_by_hand():
    answers = {"1": "2.", "2": "two", "3": "3", "4": " yes", "5": "yes"}
    assert Five().score(answers) == {"accuracy": 3 / 5, "accuracy/count": 2 / 3, "accuracy/existence": 1 / 2, "count": 5.0}


def score(questions, answers):
    return Five().score(answers, questions)


def blind(questions):
    return score(questions, text_only_best(Five(), questions))


def test_a_part_of_the_questions_is_scored_over_that_part():
    assert score([QUESTIONS[2], QUESTIONS[4]], {"3": "3", "5": "yes"}) == {
        "accuracy": 1 / 2,
        "accuracy/count": 1.0,
        "accuracy/existence": 0.0,
        "count": 2.0,
    }


def test_order_does_not_matter():
    answers = {"1": "2.", "2": "two", "3": "3", "4": " yes", "5": "yes"}
    assert Five().score(dict(reversed(answers.items()))) == Five().score(answers)


def test_answers_and_questions_must_be_the_same():
    with pytest.raises(RecipeError, match="five questions: 1 of 2 answers are to questions that were not asked: 6"):
        Five().score({"1": "2", "6": "2"})
    with pytest.raises(RecipeError, match="five questions: 2 of 5 questions have no answer: 2, 5"):
        Five().score({"1": "2", "3": "3", "4": "no"})
    with pytest.raises(RecipeError, match="no questions"):
        Five().score({}, [])


def test_questions_without_group_count_in_the_whole_only():
    assert score([Question("1", "p", (), "x")], {"1": "X"}) == {"accuracy": 1.0, "count": 1.0}


def test_text_only_best_is_the_majority_of_each_prompt():
    # "how many": 2 is right twice of three; each of the other two prompts has one answer
    assert blind(QUESTIONS) == {"accuracy": 4 / 5, "accuracy/count": 2 / 3, "accuracy/existence": 1.0, "count": 5.0}


def test_text_only_best_counts_spellings_that_score_alike_together():
    prompt_of = [Question(str(i), "p", (), reference) for i, reference in enumerate(["yes", "Yes", "yes.", "no", "no"])]
    assert blind(prompt_of)["accuracy"] == 3 / 5


def test_text_only_best_knows_the_prompt_but_not_the_group():
    mixed = [Question("1", "p", (), "x", "a"), Question("2", "p", (), "x", "a"), Question("3", "p", (), "y", "b")]
    assert blind(mixed) == {"accuracy": 2 / 3, "accuracy/a": 1.0, "accuracy/b": 0.0, "count": 3.0}


def test_a_limit_draws_the_same_questions_in_their_order():
    drawn = Five().draw(3)
    assert drawn == Five().draw(3) == [question for question in QUESTIONS if question in drawn]
    assert len(drawn) == 3
    assert Five().draw(None) == Five().draw(5) == QUESTIONS


def test_benchmarks_need_no_torch():
    script = "import sys, components.benchmarks, components.benchmarks.records, components.score, components.compare; "
    script += "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
