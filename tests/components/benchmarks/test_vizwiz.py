"""VizWiz: what answers are worth, who is found unanswerable, what the files may lack. Official outputs: test_vizwiz_golden.py."""

import json
import re
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import yaml

from components.benchmarks.benchmark import Question, text_only_best
from components.benchmarks.vizwiz import PROMPT, VizWiz
from components.errors import RecipeError

RECIPES = Path(__file__).parents[3] / "recipes" / "benchmark"
RULES = PROMPT.removeprefix("{question}")


def made(folder, split="val", pictures=False, **arguments):
    benchmark = VizWiz(str(folder), split, **arguments)
    benchmark.setup(pictures)
    return benchmark


def crowd(*answers, answerable=1, name="x"):
    facts = {"answers": list(answers), "answer_type": "other", "answerable": answerable}
    return Question(name, "", (name,), answers[0], "other", facts)


# --- accuracy and answerability from sums


@pytest.mark.parametrize(
    ("answers", "worth"),
    [
        (["a"] * 10, {"a": 1.0}),
        (["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["d"], {"a": 1.0, "b": 0.9, "c": 0.6, "d": 0.3}),
        (["a"] * 3, {"a": 2 / 3}),
        (["a", "a", "b"], {"a": (1 / 3 + 1 / 3 + 2 / 3) / 3, "b": (1 / 3 + 1 / 3) / 3}),
        (["a"], {"a": 0.0}),
    ],
)
def test_worth_divides_by_the_real_number_of_answers(answers, worth):
    assert VizWiz("").worth(crowd(*answers)) == pytest.approx(worth, rel=0, abs=1e-12)


def test_predictions_are_normalized_and_the_crowd_is_not():
    benchmark, question = VizWiz(""), crowd(*["the cat"] * 5, *["cat"] * 3, *["don't"] * 2)
    assert [benchmark.credit(question, answer) for answer in ("The cat.", "cat", "don't", "dont")] == [0.9, 0.9, 0.6, 0.0]
    assert VizWiz("", normalizer="vqa_v2").credit(question, "dont") == 0.6
    assert text_only_best(benchmark, [question]) == {"x": "cat"}


def average_precision(positive, score):
    """The sum over thresholds of the gain in recall times the precision there."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        chosen = score >= threshold
        recall = (chosen & positive).sum() / positive.sum()
        total, before = total + (recall - before) * (chosen & positive).sum() / chosen.sum(), recall
    return total


def test_answerability_of_random_answers():
    draw = np.random.default_rng(1)
    benchmark = VizWiz("")
    for size in (1, 2, 3, 10, 40) * 10:
        positive, called = draw.random((2, size)) < draw.random((2, 1))
        if not positive.any():
            continue
        asked = [crowd("yes", answerable=int(not label), name=str(number)) for number, label in enumerate(positive)]
        answers = {str(number): "Unanswerable." if said else "yes" for number, said in enumerate(called)}
        metrics = benchmark.score(answers, asked)
        assert metrics["answerability_ap"] == pytest.approx(average_precision(positive, called * 1.0), rel=0, abs=1e-12)
        f1 = 2 * (positive & called).sum() / (positive.sum() + called.sum())
        assert metrics["answerability_f1"] == pytest.approx(f1, rel=0, abs=1e-12)


def test_answerability_where_everything_can_be_answered_is_nothing_as_in_the_official_code():
    metrics = VizWiz("").score({"x": "unanswerable"}, [crowd("yes")])
    assert (metrics["answerability_ap"], metrics["answerability_f1"]) == (0.0, 0.0)


# --- rows of answer files


@pytest.mark.parametrize(
    "row", [{"id": "VizWiz_val_00000007.jpg"}, {"image": "VizWiz_val_00000007.jpg"}, {"question_id": 7}, {"question_id": "7"}]
)
def test_rows_of_answer_files(row):
    assert VizWiz("").question_id(row | {"answer": "yes"}) == "VizWiz_val_00000007.jpg"


@pytest.mark.parametrize("row", [{"text": "yes"}, {"question_id": "seven"}, {"question_id": -1}, {"question_id": 7.5}])
def test_rows_that_name_no_question(row):
    with pytest.raises(
        RecipeError, match=rf"{re.escape(str(row))} names no VizWiz question: give it id, image or LLaVA's question_id"
    ):
        VizWiz("").question_id(row)


# --- files


def entry(number, **changes):
    answers = [{"answer": text, "answer_confidence": "yes"} for text in ["blue", "red", "red", "blue", "it is blue"]]
    whole = {"image": f"VizWiz_val_{number:08d}.jpg", "question": "What COLOR is this? ", "answers": answers}
    return {key: value for key, value in (whole | {"answer_type": "other", "answerable": 1} | changes).items() if value is not None}


def layout(folder, annotations="", pictures="val", entries=None, split="val"):
    for place in (annotations, pictures):
        (folder / place).mkdir(exist_ok=True)
    entries = [entry(0), entry(1)] if entries is None else entries
    (folder / annotations / f"{split}.json").write_text(json.dumps(entries))
    for name in ("VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"):
        (folder / pictures / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize("annotations", ["", "Annotations", "annotations"])
@pytest.mark.parametrize("pictures", ["val", ""])
def test_layouts(tmp_path, annotations, pictures):
    benchmark = made(layout(tmp_path, annotations, pictures), pictures=True)
    first, second = benchmark.questions()
    facts = {"answers": ["blue", "red", "red", "blue", "it is blue"], "answer_type": "other", "answerable": 1}
    name = "VizWiz_val_00000000.jpg"
    assert first == Question(name, "<image>\nWhat color is this? " + RULES, (name,), "blue", "other", facts)
    assert benchmark.read_image(second.images[0]) == b"VizWiz_val_00000001.jpg"


def test_pictures_beside_an_empty_folder_of_the_split(tmp_path):
    layout(tmp_path, pictures="").joinpath("val").mkdir()
    assert made(tmp_path, pictures=True).read_image("VizWiz_val_00000000.jpg") == b"VizWiz_val_00000000.jpg"


def test_another_prompt(tmp_path):
    benchmark = made(layout(tmp_path), prompt="{question} Be brief, {name}.")
    assert benchmark.questions()[0].prompt == "<image>\nWhat color is this?  Be brief, {name}."


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"The folder .*nowhere does not exist\. Unpack Annotations\.zip and val\.zip"):
        made(tmp_path / "nowhere")


def test_a_missing_annotation_file_says_which_are_there(tmp_path):
    with pytest.raises(
        RecipeError, match=r"has no test\.json.*; it has .*Annotations/val\.json\. Unpack Annotations\.zip .* split\."
    ):
        made(layout(tmp_path, "Annotations"), "test")
    with pytest.raises(RecipeError, match=r"has no val\.json, .*; it has no JSON\. "):
        made(tmp_path / "val")


def test_truncated_annotations(tmp_path):
    file = layout(tmp_path) / "val.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(RecipeError, match=r"val\.json is not valid JSON, perhaps truncated: .*It is in Annotations\.zip"):
        made(tmp_path)


@pytest.mark.parametrize("content", [{"image": "x"}, []])
def test_annotations_that_are_no_list(tmp_path, content):
    with pytest.raises(RecipeError, match=r"val\.json is no list of questions\. Unpack"):
        made(layout(tmp_path, entries=content))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (entry(1, image=None), "image missing or of another type"),
        (entry(1, question=3), "question missing or of another type"),
        (entry(1, answers=None, answerable=None), "answers, answerable missing or of another type"),
        (entry(1, answer_type=None), "answer_type missing or of another type"),
        ("VizWiz_val_00000001.jpg", "image, question, answers, answer_type, answerable missing"),
        (entry(1, answers=[]), r'answers must be one or more {"answer": TEXT} and answerable 0 or 1; they are \[\] and 1'),
        (entry(1, answers=["yes", {"answer": "no"}]), r"they are \['yes', {'answer': 'no'}\] and 1"),
        (entry(1, answers=[{"answer": 3}]), r"they are \[{'answer': 3}\] and 1"),
        (entry(1, answerable=2), r"answerable 0 or 1; they are \[.* and 2\. Unpack"),
        (entry(0), r"VizWiz_val_00000000\.jpg stands already in entry 1\. Keep one"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, second, words):
    with pytest.raises(RecipeError, match=rf"val\.json, entry 2: .*{words}"):
        made(layout(tmp_path, entries=[entry(0), second]))


def test_test_asks_for_no_answers(tmp_path):
    layout(tmp_path, entries=[{"image": "VizWiz_val_00000000.jpg", "question": "why"}], split="test")
    assert made(tmp_path, "test").questions()[0].facts == {}
    with pytest.raises(RecipeError, match=r"entry 1: question missing"):
        made(layout(tmp_path, entries=[{"image": "VizWiz_val_00000000.jpg"}], split="test"), "test")


def test_missing_pictures(tmp_path):
    layout(tmp_path)
    (tmp_path / "val" / "VizWiz_val_00000001.jpg").unlink()
    with pytest.raises(RecipeError, match=r"val lacks 1 of 2 pictures, VizWiz_val_00000001\.jpg first\. Unpack val\.zip"):
        made(tmp_path, pictures=True)
    with pytest.raises(RecipeError, match=r"VizWiz_val_00000001\.jpg cannot be read \(No such file"):
        made(tmp_path).read_image("VizWiz_val_00000001.jpg")
    (tmp_path / "val").rename(tmp_path / "pictures")
    with pytest.raises(RecipeError, match=rf"{re.escape(str(tmp_path))} lacks 2 of 2 pictures, .* lie in .*/val or in .*\."):
        made(tmp_path, pictures=True)


def test_constructing_opens_nothing_and_checks_the_prompt():
    assert VizWiz("no such folder").questions() == []
    with pytest.raises(RecipeError, match=r"write \{question\}"):
        VizWiz("no such folder", prompt="What is this?")


@pytest.mark.parametrize(("name", "split"), [("vizwiz", "val"), ("vizwiz_test", "test")])
def test_the_recipes_state_everything(name, split):
    text = (RECIPES / f"{name}.yaml").read_text()
    stated = yaml.safe_load(text)["init_args"]
    assert set(stated) == set(signature(VizWiz).parameters)
    benchmark = VizWiz(**stated)
    assert benchmark.stated()["init_args"] == stated == VizWiz("data/vizwiz", split).stated()["init_args"]
    assert f"# prompt hash: {benchmark.prompt_hash()}\n" in text
