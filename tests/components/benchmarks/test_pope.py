"""POPE: the official scores of real answers, and what its files may lack."""

import json
import random
from functools import cache
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import yaml

from components.benchmarks.pope import POPE
from components.errors import RecipeError

END = "\nAnswer the question using a single word or phrase."
CASES = {"TP": "tp", "FP": "fp", "TN": "tn", "FN": "fn"}
REALS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@cache
def official(folder):
    made = POPE(str(folder / "pope" / "coco"), "no pictures", splits=("random", "popular"))
    made.setup(pictures=False)
    return made


def expected(golden):
    return json.loads((golden / "pope" / "EXPECTED.json").read_text())["expected"]


def demand_official(benchmark, answers, split, detail):
    asked = [question for question in benchmark.questions() if question.id in answers]
    totals = benchmark.tally(asked, answers).totals()
    metrics = benchmark.score(answers, asked)
    for theirs, ours in CASES.items():
        assert totals[f"{ours}/{split}"] == detail[theirs], theirs
    for name in REALS:
        assert metrics[f"{name}/{split}"] == pytest.approx(detail[name], rel=0, abs=1e-9), name


# --- against the official scorer


@pytest.mark.parametrize(("split", "count"), [("random", 2910), ("popular", 3000)])
def test_official_scores_of_13b(golden, split, count):
    file = f"llava-v1.5-13b.{split}.jsonl"
    answers = {official(golden).question_id(row): row["text"] for row in jsonl(golden / "pope" / file)}
    assert len(answers) == count
    demand_official(official(golden), answers, split, expected(golden)[file])


def test_official_scores_of_7b(golden):
    file = "llava-v1.5-7b.random.jsonl"
    answers = {official(golden).question_id(row): row["text"] for row in jsonl(golden / "pope" / file)}
    assert len(answers) == expected(golden)[file]["n"] == 2712
    demand_official(official(golden), answers, "random", expected(golden)[file]["by_question_id"])
    demand_official(official(golden), answers, "random", expected(golden)[file]["positional_zip_as_official_script"])


def test_the_whole_is_the_mean_of_the_splits(golden):
    files = [f"llava-v1.5-13b.{split}.jsonl" for split in ("random", "popular")]
    answers = {official(golden).question_id(row): row["text"] for file in files for row in jsonl(golden / "pope" / file)}
    metrics = official(golden).score(answers)
    for name in REALS:
        assert metrics[name] == pytest.approx(np.mean([expected(golden)[file][name] for file in files]), rel=0, abs=1e-9), name
    assert metrics["count"] == 5910
    assert [name for name in metrics if "/" not in name] == ["f1", "accuracy", "precision", "recall", "yes_ratio", "count"]


def test_every_edge_case_is_parsed_as_officially(golden):
    rows = expected(golden)["edge_cases.jsonl"]
    assert [row["answer"] for row in rows] == [row["answer"] for row in jsonl(golden / "pope" / "edge_cases.jsonl")]
    assert len(rows) == 28
    for row in rows:
        assert POPE("nowhere", "nowhere").normalize(row["answer"]) == row["official_label"], row


@pytest.mark.parametrize("split", ["random", "popular"])
def test_ids_pictures_and_prompts_are_llavas(golden, split):
    theirs = jsonl(golden / "pope" / f"llava_pope_test.{split}.jsonl")
    by_id = {question.id: question for question in official(golden).questions() if question.group == split}
    assert len(theirs) == len(by_id)
    for row in theirs:
        found = by_id.pop(official(golden).question_id({"question_id": row["question_id"], "prompt": row["text"]}))
        assert (found.images, found.prompt, found.group) == ((row["image"],), f"<image>\n{row['text']}", row["category"]), row
    assert not by_id


def test_the_release_is_named(golden, tmp_path):
    assert "release" not in official(golden).describe()
    told = "; not the release that LLaVA-1.5 uses: popular has 3 questions"
    assert made(tmp_path, splits=["popular"]).describe().endswith(told)


def test_order_does_not_count(golden):
    rows = jsonl(golden / "pope" / "llava-v1.5-7b.random.jsonl")
    answers = {official(golden).question_id(row): row["text"] for row in rows}
    random.Random(0).shuffle(rows)
    shuffled = {official(golden).question_id(row): row["text"] for row in rows}
    assert list(shuffled) != list(answers)
    asked = [question for question in official(golden).questions() if question.id in answers]
    assert official(golden).score(shuffled, asked[::-1]) == official(golden).score(answers, asked)
    assert POPE("nowhere", "nowhere").score(answers, asked) == official(golden).score(answers, asked)


# --- on small files


def record(number, **changes):
    label = "yes" if number < 3 else "no"
    return {"question_id": number, "image": f"{number % 2}.jpg", "text": f"Is there a {number}?", "label": label} | changes


def write(file, records):
    file.write_text("".join(json.dumps(row) + "\n" for row in records))


def made(folder, records=None, pictures=True, **values):
    """Three records for each split, two about 1.jpg and one about 0.jpg, two with yes and one with no."""
    for split in ("random", "popular", "adversarial"):
        write(folder / f"coco_pope_{split}.json", records or [record(number) for number in (1, 2, 3)])
    for name in ("0.jpg", "1.jpg"):
        (folder / name).write_bytes(name.encode())
    benchmark = POPE(str(folder), str(folder), **values)
    benchmark.setup(pictures)
    return benchmark


def test_questions(tmp_path):
    benchmark = made(tmp_path, prompt="{question} Say yes or no.")
    assert [question.id for question in benchmark.questions()][:4] == ["random/1", "random/2", "random/3", "popular/1"]
    first = benchmark.questions()[0]
    assert (first.prompt, first.images) == ("<image>\nIs there a 1? Say yes or no.", ("1.jpg",))
    assert (first.reference, first.group, first.facts) == ("yes", "random", {"question": "Is there a 1?"})
    assert benchmark.worth(first) == {"yes": 1.0}
    assert benchmark.read_image("1.jpg") == b"1.jpg"
    assert made(tmp_path).questions()[0].prompt == f"<image>\nIs there a 1?{END}"
    assert [question.group for question in made(tmp_path, splits=["popular"]).questions()] == ["popular"] * 3
    assert made(tmp_path).questions() == made(tmp_path).questions() != benchmark.questions()


def test_scores_by_hand(tmp_path):
    benchmark = made(tmp_path)
    answers = {question.id: question.reference for question in benchmark.questions()}
    assert benchmark.score(answers)["f1"] == 1
    answers |= {"random/1": "no", "random/2": "No, not there.", "popular/2": "no", "adversarial/3": "NO"}
    metrics = benchmark.score(answers)  # random: tn 1, fn 2; popular: tp 1, tn 1, fn 1; adversarial: tp 2, fp 1
    assert [metrics[f"f1/{split}"] for split in benchmark.splits] == pytest.approx([0, 2 / 3, 4 / 5])
    assert metrics["f1"] == pytest.approx((0 + 2 / 3 + 4 / 5) / 3)
    assert [metrics[f"precision/{split}"] for split in benchmark.splits] == pytest.approx([0, 1, 2 / 3])
    assert [metrics[f"recall/{split}"] for split in benchmark.splits] == pytest.approx([0, 1 / 2, 1])
    assert [metrics[f"accuracy/{split}"] for split in benchmark.splits] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert [metrics[f"yes_ratio/{split}"] for split in benchmark.splits] == pytest.approx([0, 1 / 3, 1])


def test_one_answer_to_everything_divides_by_nothing(tmp_path):
    negatives = [record(number, label="no") for number in (1, 2)]
    for records, answer in ((negatives, "no"), (negatives, "yes"), (None, "no")):
        benchmark = made(tmp_path, records)
        metrics = benchmark.score({question.id: answer for question in benchmark.questions()})
        assert metrics["f1"] == metrics["precision"] == metrics["recall"] == 0
        assert metrics["yes_ratio"] == (answer == "yes")


def test_intervals_draw_pictures_over_all_splits(tmp_path):
    benchmark = made(tmp_path)
    answers = {question.id: "yes" if question.images == ("1.jpg",) else "no" for question in benchmark.questions()}
    counted = benchmark.tally(benchmark.questions(), answers)
    assert (counted.units, list(counted.strata)) == (["0.jpg", "1.jpg"], [0, 0])
    drawn = benchmark.metrics(counted.resampled(100))
    # 0.jpg: one yes that is missed; 1.jpg: a yes found and a no that is called yes. Each twice, or one of each
    assert set(np.round(drawn["recall"], 9)) == {0, 0.5, 1}
    assert set(np.round(drawn["accuracy"], 9)) == {0, round(1 / 3, 9), 0.5}


def test_missing_and_unknown_answers_are_named(tmp_path):
    benchmark = made(tmp_path)
    answers = {question.id: "yes" for question in benchmark.questions()}
    with pytest.raises(RecipeError, match=r"1 of 10 answers are to questions that were not asked: random/4"):
        benchmark.score(answers | {"random/4": "yes"})
    del answers["popular/2"]
    with pytest.raises(RecipeError, match=r"1 of 9 questions have no answer: popular/2"):
        benchmark.score(answers)


def test_rows_of_answer_files(tmp_path):
    benchmark = made(tmp_path)
    assert benchmark.question_id({"id": "popular/3", "prompt": "anything", "answer": "no"}) == "popular/3"
    merged = {1: "adversarial/1", 10000002: "random/2", 20000003: "popular/3", "20000003": "popular/3"}
    for number, name in merged.items():
        row = {"question_id": number, "text": "Yes"}
        assert benchmark.question_id(row) == benchmark.question_id(row | {"prompt": f"Is there a {name[-1]}?{END}"}) == name


@pytest.mark.parametrize("changes", [{"question_id": number} for number in (4, 10000000, 30000001, -1, "one", None)] + [{}])
def test_rows_without_question_are_shown(tmp_path, changes):
    with pytest.raises(RecipeError, match=r"no question for the row \{'text': 'Yes'.*adversarial from 1, random from 10000001"):
        made(tmp_path).question_id({"text": "Yes"} | changes)


def test_rows_of_a_split_that_is_not_asked(tmp_path):
    with pytest.raises(RecipeError, match=r"POPE \(random\) .* no question for the row .*'question_id': 20000001"):
        made(tmp_path, splits=["random"]).question_id({"question_id": 20000001})


def test_answers_to_another_release_are_refused(tmp_path):
    row = {"question_id": 10000002, "prompt": f"Is there a cat?{END}", "text": "Yes"}
    with pytest.raises(
        RecipeError, match=r"'question_id': 10000002.* asks something else than question random/2 .*'Is there a 2\?'"
    ):
        made(tmp_path).question_id(row)


# --- what may be missing or broken


def test_missing_folders_files_and_pictures(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere does not exist.*RUCAIBox/POPE"):
        POPE(str(tmp_path / "nowhere"), str(tmp_path)).setup()
    made(tmp_path)
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(RecipeError, match=r"lacks 1 of 2 pictures, 1\.jpg first.*COCO val2014"):
        POPE(str(tmp_path), str(tmp_path)).setup()
    with pytest.raises(RecipeError, match=r"no_pictures does not exist.*key images"):
        POPE(str(tmp_path), str(tmp_path / "no_pictures")).setup()
    POPE(str(tmp_path), str(tmp_path / "no_pictures")).setup(pictures=False)
    (tmp_path / "coco_pope_popular.json").rename(tmp_path / "popular.json")
    with pytest.raises(RecipeError, match=r"coco_pope_popular\.json does not exist.*RUCAIBox/POPE"):
        POPE(str(tmp_path), str(tmp_path)).setup()


@pytest.mark.parametrize(
    "change", [{"label": "maybe"}, {"label": None}, {"text": 3}, {"image": None}, {"question_id": None}, {"label": ["yes"]}]
)
def test_broken_records_are_named(tmp_path, change):
    with pytest.raises(RecipeError, match=r"coco_pope_random\.json line 2: needs question_id, image, text and label"):
        made(tmp_path, [record(1), record(2, **change)])


def test_an_id_that_occurs_twice(tmp_path):
    with pytest.raises(RecipeError, match=r"coco_pope_random\.json line 3: question_id 1 occurs twice"):
        made(tmp_path, [record(1), record(2), record(1)])


def test_a_truncated_file(tmp_path):
    made(tmp_path)
    file = tmp_path / "coco_pope_adversarial.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(RecipeError, match=r"(?s)coco_pope_adversarial\.json line 3 is not valid JSON.*truncated"):
        POPE(str(tmp_path), str(tmp_path)).setup()


def test_constructing_opens_nothing():
    POPE("no such folder", "no such folder")
    with pytest.raises(RecipeError, match=r"write \{question\}"):
        POPE("no such folder", "no such folder", prompt="Yes or no?")


@pytest.mark.parametrize("splits", [[], ["random", "random"]])
def test_splits_that_make_no_score(splits):
    with pytest.raises(RecipeError, match=r"splits = \[.*\] must be one or more of random, popular and adversarial"):
        POPE("no such folder", "no such folder", splits=splits)


def test_the_recipe_states_everything():
    text = (Path(__file__).parents[3] / "recipes" / "benchmark" / "pope.yaml").read_text()
    stated = yaml.safe_load(text)["init_args"]
    assert set(stated) == set(signature(POPE).parameters)
    benchmark = POPE(**stated)
    assert benchmark.stated()["init_args"] == stated == POPE(stated["folder"], stated["images"]).stated()["init_args"]
    assert f"# prompt hash: {benchmark.prompt_hash()}\n" in text
