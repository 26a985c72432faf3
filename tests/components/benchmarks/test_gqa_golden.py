"""GQA against its official eval.py, on stored answers of LLaVA-1.5-13B and on edge cases."""

import json
import re
from functools import cache

import pytest

from components.benchmarks.gqa import GQA
from components.benchmarks.records import read_answers

DETAIL = {
    "structural type": "/structural.",
    "semantic type": "/semantic.",
    "steps number": "_by_steps/",
    "words number": "_by_words/",
}


def opened(folder, split, normalizer="gqa"):
    benchmark = GQA(str(folder), split, normalizer=normalizer)
    benchmark.setup(pictures=False)
    return benchmark


@cache
def stored(golden, split):
    """Golden questions, read once."""
    return opened(golden / "gqa", split)


# --- the official scorer


def expected(golden, key):
    return json.loads((golden / "gqa/EXPECTED.json").read_text())["expected"][key]


def assert_as_official(benchmark, answers, official):
    """Every number that eval.py prints, at its two decimals, and the numbers of questions exactly; scores and sums out."""
    scored, totals = benchmark.score(answers), benchmark.tally(benchmark.questions(), answers).totals()
    scores = dict(scored)
    absent = benchmark.not_available()
    for name in ("binary", "open", "accuracy", "consistency", "validity", "plausibility", "distribution"):
        if name in absent or name not in official:
            assert name not in scores, name
        else:
            assert f"{scores.pop(name) * (1 if name == 'distribution' else 100):.2f}" == f"{official[name]:.2f}", name
    for title, part in DETAIL.items():
        for group, values in official["detail"][title].items():
            assert f"{100 * scores.pop(f'accuracy{part}{group}'):.2f}" == f"{values['accuracy']:.2f}", (title, group)
            assert totals[f"questions{part}{group}"] == values["n"], (title, group)
    assert list(scores) == ["count"]  # eval.py has no other group
    return scored, totals


@pytest.mark.parametrize("source", ["llava", "official"])
def test_llava_13b_scores_as_with_eval_py(golden, source):
    benchmark, official = stored(golden, "ood_testdev_head"), expected(golden, "ood_testdev_head llava-v1.5-13b")
    if source == "llava":
        answers = read_answers(golden / "gqa/ood_testdev_head_llava-v1.5-13b_answers.jsonl", benchmark)
    else:
        answers = read_answers(golden / "gqa/ood_testdev_head_predictions.json", benchmark)
    scores, totals = assert_as_official(benchmark, answers, official)
    assert (totals["credit"], totals["questions"]) == (official["correct"], official["n"])
    assert abs(100 * scores["accuracy"] - official["accuracy_unrounded"]) < 1e-9
    assert scores["count"] == official["n"]
    assert benchmark.score(dict(reversed(answers.items()))) == scores


def test_our_rule_is_llavas_and_without_lower_case_nothing_is_right(golden):
    benchmark = stored(golden, "ood_testdev_head")
    raw = read_answers(golden / "gqa/ood_testdev_head_llava-v1.5-13b_answers.jsonl", benchmark)
    official = read_answers(golden / "gqa/ood_testdev_head_predictions.json", benchmark)
    assert {name: benchmark.normalize(text) for name, text in raw.items()} == official
    trap = expected(golden, "ood_testdev_head llava-v1.5-13b")["other_postprocessing_for_information"]["raw text, no lower-casing"]
    assert GQA("", normalizer="none").score(raw, benchmark.questions())["accuracy"] == trap == 0.0


def test_consistency_as_with_eval_py(golden):
    benchmark, official = stored(golden, "consistency_head"), expected(golden, "consistency_head (--consistency)")
    answers = read_answers(golden / "gqa/consistency_head_predictions.json", benchmark)
    assert "consistency" not in benchmark.not_available()
    scores, _ = assert_as_official(benchmark, answers, official)
    assert sum(bool(question.facts["entailed"]) for question in benchmark.questions()) == official["n_with_entailed_inside"]
    assert benchmark.score(dict(reversed(answers.items()))) == scores


@pytest.mark.parametrize(
    ("normalizer", "file", "key"),
    [("none", "as_is", "as_is"), ("gqa", "as_is", "llava_converted"), ("gqa", "llava_converted", "llava_converted")],
)
def test_edge_cases_as_with_eval_py(golden, normalizer, file, key):
    benchmark, official = opened(golden / "gqa", "edge", normalizer), expected(golden, f"edge ({key})")
    answers = read_answers(golden / f"gqa/edge_predictions_{file}.json", benchmark)
    asked = benchmark.questions()
    assert [question.id for question in asked] == list(official["per_question_correct"])  # the two unbalanced ones are not asked
    for question in asked:
        right = benchmark.credit(question, answers[question.id]) == 1.0
        assert right == official["per_question_correct"][question.id], (question.id, answers[question.id], question.reference)
    assert list(benchmark.not_available()) == ["consistency"]
    assert_as_official(benchmark, answers, official)


def test_prompts_are_llavas(golden):
    lines = (golden / "gqa/ood_testdev_head_llava_questions.jsonl").read_text().splitlines()
    asked = {question.id: (question.prompt, question.images) for question in stored(golden, "ood_testdev_head").questions()}
    assert asked == {row["question_id"]: (f"<image>\n{row['text']}", (row["image"],)) for row in map(json.loads, lines)}


def test_what_testdev_does_not_allow_is_absent_and_says_why(golden):
    benchmark = stored(golden, "ood_testdev_head")
    reasons = benchmark.not_available()
    assert list(reasons) == ["consistency", "validity", "plausibility"]
    assert re.match(r"\d+ of \d+ entailed questions are not asked, \d+ among them", reasons["consistency"])
    assert f"it needs ood_choices.json in {golden / 'gqa'} or one folder below" in reasons["validity"]
    assert not reasons.keys() & benchmark.score({question.id: "" for question in benchmark.questions()}).keys()


# --- by hand
