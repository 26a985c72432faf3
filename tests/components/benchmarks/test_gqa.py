"""GQA scored by hand where the official numbers do not reach, and the files it reads and refuses."""

import inspect
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from components.benchmarks.benchmark import Question, text_only_best
from components.benchmarks.gqa import GQA
from components.errors import RecipeError

RECIPE = Path(__file__).parents[3] / "recipes/benchmark/gqa.yaml"


def opened(folder, split):
    benchmark = GQA(str(folder), split)
    benchmark.setup(pictures=False)
    return benchmark


def entry(**changes):
    return {
        "question": "What is on the wall?",
        "imageId": "n1",
        "answer": "mirror",
        "isBalanced": True,
        "entailed": [],
        "groups": {"global": "object", "local": "14-wall_on,s"},
        "types": {"structural": "query", "semantic": "rel", "detailed": "relS"},
        "semantic": [
            {"operation": "select", "dependencies": [], "argument": "wall (3)"},
            {"operation": "query", "dependencies": [0], "argument": "name"},
        ],
    } | changes


def binary(**changes):
    types = {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"}
    return entry(answer="yes", types=types, groups={"global": None, "local": "a"}) | changes


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def pictures(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.jpg").write_bytes(name.encode())


ENTAILING = {
    "1": entry(entailed=["1", "2", "3"]),
    "2": entry(isBalanced=False, entailed=["4"], answer="wall"),
    "3": binary(imageId="n2", entailed=["1"]),
    "4": entry(isBalanced=False),  # only an unbalanced question entails it
    "5": binary(imageId="n2", groups={"global": "object", "local": "b"}),
}


def test_consistency_is_the_accuracy_on_what_right_answers_entail(tmp_path):
    write(tmp_path / "val_all_questions.json", ENTAILING)
    benchmark = opened(tmp_path, "val_all")
    assert [question.id for question in benchmark.questions()] == ["1", "2", "3", "5"]
    right = {"1": "mirror", "2": "wall", "3": "yes", "5": "yes"}
    assert benchmark.score(right)["consistency"] == 1.0
    # 1 is right, and of 2 and 3 one is; 3 is right, and so is 1
    scores = benchmark.score(right | {"2": "no"})
    assert (scores["consistency"], scores["accuracy"], scores["count"]) == ((1 / 2 + 1) / 2, 1.0, 4.0)
    assert benchmark.score(right | {"1": "door"})["consistency"] == 0.0  # 3 alone is right, and 1 is not
    assert benchmark.score(dict.fromkeys(right, "none"))["consistency"] == 0.0  # as eval.py has it
    assert list(benchmark.not_available()) == ["validity", "plausibility"]


def test_consistency_needs_every_entailed_question(tmp_path):
    write(tmp_path / "val_all_questions.json", ENTAILING)
    benchmark = opened(tmp_path, "val_all")
    asked = [question for question in benchmark.questions() if question.id != "2"]
    reason = benchmark.not_available(asked)["consistency"]
    assert reason.startswith("1 of 3 entailed questions are not asked, 2 among them")
    assert "consistency" not in benchmark.score({question.id: "yes" for question in asked}, asked)


def test_scores_by_hand(tmp_path):
    write(tmp_path / "val_all_questions.json", ENTAILING)
    benchmark = opened(tmp_path, "val_all")
    scores = benchmark.score({"1": "Mirror..", "2": "wall", "3": "yes", "5": "mirror"})
    assert scores == {
        "accuracy": 2 / 3,
        "binary": 1 / 2,
        "open": 1.0,
        "consistency": 1.0,
        "accuracy/semantic.attr": 1 / 2,
        "accuracy/semantic.rel": 1.0,
        "accuracy/structural.query": 1.0,
        "accuracy/structural.verify": 1 / 2,
        "accuracy_by_steps/1": 2 / 3,
        "accuracy_by_words/5": 2 / 3,
        "count": 4.0,
        # of the group `object` mirror and yes are expected once each; mirror comes twice: 2 x (1 / 1 + 1 / 1) / 2 / 100
        "distribution": 0.02,
    }
    assert list(scores)[:4] == ["accuracy", "binary", "open", "consistency"]
    only_binary = [question for question in benchmark.questions() if question.id in "35"]
    assert "open" not in benchmark.score({"3": "yes", "5": "yes"}, only_binary)
    without_group = [question for question in benchmark.questions() if question.id == "3"]
    assert "distribution" in benchmark.not_available(without_group)
    assert "distribution" not in benchmark.score({"3": "yes"}, without_group)


def test_pictures_are_drawn_with_all_their_questions(tmp_path):
    write(tmp_path / "val_all_questions.json", ENTAILING)
    benchmark = opened(tmp_path, "val_all")
    answers = {"1": "mirror", "2": "wall", "3": "yes", "5": "no"}
    tally = benchmark.tally(benchmark.questions(), answers)
    assert tally.units == ["n1.jpg", "n2.jpg"]
    resampled = benchmark.metrics(tally.resampled(50))
    assert {value.shape for value in resampled.values()} == {(50,)}
    assert set(resampled["accuracy"]) == {1 / 2, 2 / 3, 1.0}  # n2 twice, both, n1 twice


@pytest.mark.parametrize("place", ["", "eval", "questions1.2"])
def test_validity_and_plausibility(tmp_path, place):
    questions = {
        "1": entry(),
        "2": entry(imageId="n2"),
        "3": entry(types={"structural": "compare", "semantic": "attr", "detailed": "twoCommon"}, answer="shape"),
        "4": entry(isBalanced=False),
    }
    write(tmp_path / "val_balanced_questions.json", questions)
    choices = {"valid": ["mirror", "door"], "plausible": ["mirror"]}
    write(tmp_path / place / "val_choices.json", dict.fromkeys(("1", "2", "3", "9"), choices))
    benchmark = opened(tmp_path, "val_balanced")
    scores = benchmark.score({"1": "Door.", "2": "two", "3": "Material"})
    # for what two things have in common the answers are color, material and shape, whatever the file says
    assert (scores["validity"], scores["plausibility"], scores["accuracy"]) == (2 / 3, 1 / 3, 0.0)
    assert benchmark.score({"1": "mirror", "2": "door", "3": "mirror"})["validity"] == 2 / 3
    assert list(benchmark.not_available()) == ["consistency"]


def test_choices_must_cover_every_balanced_question(tmp_path):
    write(tmp_path / "val_balanced_questions.json", {"1": entry(), "2": entry()})
    write(tmp_path / "val_choices.json", {"1": {"valid": [], "plausible": []}})
    benchmark = opened(tmp_path, "val_balanced")
    assert {"validity", "plausibility"} <= benchmark.not_available().keys()
    assert "validity" not in benchmark.score({"1": "a", "2": "b"})
    write(tmp_path / "val_choices.json", {"1": {"valid": []}, "2": {"valid": [], "plausible": []}})
    with pytest.raises(RecipeError, match=r"val_choices\.json: `plausible` is missing"):
        opened(tmp_path, "val_balanced")


def test_questions_that_were_written_down_score_without_files(tmp_path):
    write(tmp_path / "val_all_questions.json", ENTAILING)
    benchmark = opened(tmp_path, "val_all")
    rows = json.loads(json.dumps([asdict(question) for question in benchmark.questions()]))
    asked = [Question(**row | {"images": tuple(row["images"])}) for row in rows]
    answers = {"1": "mirror", "2": "no", "3": "yes", "5": "no"}
    bare = GQA("nowhere", "val_all")
    assert bare.score(answers, asked) == benchmark.score(answers)
    assert list(bare.not_available(asked)) == list(bare.not_available()) == ["validity", "plausibility"]


def test_steps_leave_out_what_only_asks(tmp_path):
    def steps(*operations):
        return [{"operation": operation, "dependencies": [], "argument": argument} for operation, argument in operations]

    cases = {
        0: steps(("exist", "?"), ("query", "name"), ("choose name", "cat|dog")),
        1: steps(("query", "color"), ("select", "a coexisting wall")),  # eval.py looks for `exist` anywhere
        3: steps(("select", "wall (3)"), ("choose color", "red|blue"), ("verify color", "red")),
    }
    write(tmp_path / "val_questions.json", {str(count): entry(semantic=semantic) for count, semantic in cases.items()})
    assert {question.id: question.facts["steps"] for question in opened(tmp_path, "val").questions()} == {"0": 0, "1": 1, "3": 3}


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Mirror", "mirror"),
        ("mirror...", "mirror"),
        (" mirror", " mirror"),
        ("mirror. ", "mirror. "),
        ("...", ""),
        ("Yes.\n", "yes.\n"),
    ],
)
def test_only_letter_case_and_periods_at_the_end_do_not_count(answer, normal):
    assert GQA("nowhere").normalize(answer) == normal


def test_the_reference_is_taken_as_it_is(tmp_path):
    write(tmp_path / "val_questions.json", {"1": entry(answer="T-Shirt."), "2": entry(answer="mirror")})
    benchmark = opened(tmp_path, "val")
    assert benchmark.score({"1": "T-Shirt.", "2": "mirror"})["accuracy"] == 0.5
    assert text_only_best(benchmark, benchmark.questions()) == {"1": "mirror", "2": "mirror"}


@pytest.mark.parametrize("row", [{"id": "7"}, {"question_id": 7, "text": "a"}, {"questionId": "7", "prediction": "a"}, {"id": 7}])
def test_ids_are_texts_in_every_answer_file(row):
    assert GQA("nowhere").question_id(row) == "7"


def test_answers_must_be_to_the_questions(tmp_path):
    write(tmp_path / "val_questions.json", {"17": entry(), "18": entry()})
    benchmark = opened(tmp_path, "val")
    with pytest.raises(RecipeError, match="1 of 2 questions have no answer: 18"):
        benchmark.score({"17": "a"})
    with pytest.raises(RecipeError, match="1 of 3 answers are to questions that were not asked: 19"):
        benchmark.score({"17": "a", "18": "a", "19": "a"})


def test_a_part_is_drawn_from_the_balanced_questions(tmp_path):
    questions = {str(number): entry(isBalanced=number % 4 == 0, entailed=[str(number + 1)]) for number in range(40)}
    write(tmp_path / "val_all_questions.json", questions)
    benchmark = opened(tmp_path, "val_all")
    assert len(benchmark.questions()) == len(benchmark.draw(None)) == len(benchmark.draw(20)) == 20
    drawn = benchmark.draw(6)
    assert len(drawn) == 6 and drawn == benchmark.draw(6)
    assert all(question.facts["balanced"] for question in drawn)
    assert [int(question.id) for question in drawn] == sorted(int(question.id) for question in drawn)
    unbalanced = [question for question in benchmark.questions() if not question.facts["balanced"]]
    with pytest.raises(RecipeError, match="none of the 10 questions is balanced"):
        benchmark.score({question.id: "a" for question in unbalanced}, unbalanced)


# --- the files


@pytest.mark.parametrize("place", ["", "questions1.2", "data"])
@pytest.mark.parametrize("images", ["images", "data/images"])
def test_one_file_as_distributed(tmp_path, place, images):
    write(tmp_path / place / "testdev_balanced_questions.json", {"1": entry(), "2": entry(imageId="2")})
    pictures(tmp_path / images, "n1", "2")
    benchmark = GQA(str(tmp_path))
    benchmark.setup()
    first = benchmark.questions()[0]
    assert (first.id, first.reference, first.group) == ("1", "mirror", "query")
    assert first.prompt == "<image>\nWhat is on the wall?\nAnswer the question using a single word or phrase."
    assert [benchmark.read_image(question.images[0]) for question in benchmark.questions()] == [b"n1", b"2"]


@pytest.mark.parametrize("place", ["", "questions1.2"])
def test_chunks_as_distributed(tmp_path, place):
    for number in range(11):  # 10 comes after 9
        write(tmp_path / place / f"train_all_questions/train_all_questions_{number}.json", {f"q{number}": entry()})
    benchmark = opened(tmp_path, "train_all")
    assert [question.id for question in benchmark.questions()] == [f"q{number}" for number in range(11)]
    (tmp_path / place / "train_all_questions/train_all_questions_4.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(RecipeError, match=r"train_all_questions_4\.json does not exist.*dorarad/gqa"):
        opened(tmp_path, "train_all")


def test_pictures_elsewhere_and_another_prompt(tmp_path):
    write(tmp_path / "gqa/testdev_balanced_questions.json", {"1": entry()})
    pictures(tmp_path / "mix/gqa/images", "n1")
    benchmark = GQA(str(tmp_path / "gqa"), prompt="Q: {question}", images=str(tmp_path / "mix/gqa/images"))
    benchmark.setup()
    assert benchmark.read_image("n1.jpg") == b"n1"
    assert benchmark.questions()[0].prompt == "<image>\nQ: What is on the wall?"
    with pytest.raises(RecipeError, match="write {question} where the question belongs"):
        GQA("nowhere", prompt="Answer.")


def test_a_missing_folder_or_split_says_what_is_there(tmp_path):
    with pytest.raises(RecipeError, match=r"The folder .*nowhere does not exist\. Get questions1\.2\.zip"):
        GQA(str(tmp_path / "nowhere")).setup()
    with pytest.raises(RecipeError, match=r"Splits that are there \(key split\): none\."):
        GQA(str(tmp_path)).setup()
    write(tmp_path / "val_balanced_questions.json", {"1": entry()})
    write(tmp_path / "questions1.2/train_all_questions/train_all_questions_0.json", {"1": entry()})
    write(tmp_path / "testdev_balanced.json", {"1": entry()})  # renamed
    with pytest.raises(
        RecipeError, match=r"neither testdev_balanced_questions\.json nor .* \(key split\): train_all, val_balanced\."
    ):
        GQA(str(tmp_path)).setup()


def test_missing_pictures_are_named(tmp_path):
    write(tmp_path / "testdev_balanced_questions.json", {"1": entry(), "2": entry(imageId="n2"), "3": entry(imageId="n3")})
    benchmark = GQA(str(tmp_path))
    with pytest.raises(RecipeError, match=r"The folder .*images does not exist\..*key images"):
        benchmark.setup()
    pictures(tmp_path / "images", "n1", "n3")
    with pytest.raises(RecipeError, match=r"images lacks 1 of 3 pictures, n2\.jpg first"):
        benchmark.setup()
    (tmp_path / "images/n2.jpg").write_bytes(b"n2")
    benchmark.setup()
    (tmp_path / "images/n2.jpg").unlink()
    with pytest.raises(RecipeError, match=r"n2\.jpg cannot be read"):
        benchmark.read_image("n2.jpg")


def without(*keys):
    broken = entry()
    inner = broken
    for key in keys[:-1]:
        inner[key] = dict(inner[key])
        inner = inner[key]
    del inner[keys[-1]]
    return broken


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        *[(without(key), f"`{key}` is missing") for key in ("question", "imageId", "answer", "isBalanced", "entailed", "semantic")],
        *[(without("types", key), rf"`types\.{key}` is missing") for key in ("structural", "semantic", "detailed")],
        (without("types"), r"`types\.\w+` is missing"),
        (without("groups", "global"), r"`groups\.global` is missing"),
        (entry(semantic=[{"operation": "select"}]), "`argument` is missing"),
        (entry(semantic=["select"]), "`operation` is missing"),
        (entry(answer=3), "`answer` is '3', of another type"),
        (entry(isBalanced="yes"), "`isBalanced` is 'yes', of another type"),
        ("What is this?", "`question` is missing"),
    ],
)
def test_a_question_without_what_it_needs_names_file_and_id(tmp_path, broken, words):
    write(tmp_path / "test_balanced_questions.json", {"1": entry(), "201": broken})
    with pytest.raises(RecipeError, match=rf"test_balanced_questions\.json, question 201: {words}"):
        opened(tmp_path, "test_balanced")


def test_files_that_are_no_questions(tmp_path):
    file = tmp_path / "val_questions.json"
    write(file, {"1": entry()})
    file.write_text(file.read_text()[:-20])
    with pytest.raises(RecipeError, match=r"val_questions\.json is not valid JSON, perhaps truncated"):
        opened(tmp_path, "val")
    write(file, [entry()])
    with pytest.raises(RecipeError, match=r"val_questions\.json must hold entries by question id; it holds a JSON list"):
        opened(tmp_path, "val")
    for nothing in ({}, {"1": entry(isBalanced=False)}):
        write(file, nothing)
        with pytest.raises(RecipeError, match=rf"val_questions\.json: none of {len(nothing)} questions is balanced"):
            opened(tmp_path, "val")


def test_the_recipe_states_every_argument_and_the_hash_of_the_prompt():
    stated = yaml.safe_load(RECIPE.read_text())
    assert stated["class_path"] == "components.benchmarks.GQA"
    assert list(stated["init_args"]) == list(inspect.signature(GQA).parameters)
    benchmark = GQA(**stated["init_args"])
    assert benchmark.prompt == GQA("nowhere").prompt
    assert f"# prompt hash: {benchmark.prompt_hash()}\n" in RECIPE.read_text()
    assert benchmark.stated()["init_args"] == stated["init_args"]
