"""MME: the official scores of real answers, and every way its files can be laid out or broken."""

import json
import random
from collections import Counter
from functools import cache, partial
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import yaml

from components.benchmarks.mme import COGNITION, MME, SUBTASKS
from components.errors import RecipeError

APART = {"artwork", "celebrity", "landmark", "posters", "scene"}
COUNTS = {"n_questions": "questions", "n_images": "images", "other_num": "other", "TP": "tp", "FN": "fn", "TN": "tn", "FP": "fp"}
FRACTIONS = {"acc": "accuracy", "acc_plus": "accuracy_plus", "precision": "precision", "recall": "recall"}
LLAVA_7B = "llava-v1.5-7b_answers_converted_txt"
END = " Please answer yes or no."
ONE = f"Is it?{END}\tYes\n"
LLAVA_END = "\nAnswer the question using a single word or phrase."


def opened(folder, pictures=False, **values):
    made = MME(str(folder), **values)
    made.setup(pictures)
    return made


opened_once = cache(opened)
approx = partial(pytest.approx, rel=0, abs=1e-9)


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def template(golden):
    return opened_once(golden / "mme" / "ground_truth_template")


@pytest.fixture
def expected(golden):
    return json.loads((golden / "mme" / "EXPECTED.json").read_text())["expected"]


def demand_official(benchmark, answers, expected):
    asked = [question for question in benchmark.questions() if question.id in answers]
    totals = benchmark.tally(asked, answers).totals()
    metrics = benchmark.score(answers, asked)
    assert set(expected["subtask_detail"]) == set(expected["subtask_score"]) == set(SUBTASKS)
    for subtask, detail in expected["subtask_detail"].items():
        for theirs, ours in COUNTS.items():
            assert totals[f"{ours}/{subtask}"] == detail[theirs], (subtask, theirs)
        for theirs, ours in FRACTIONS.items():
            assert metrics[f"{ours}/{subtask}"] == approx(detail[theirs]), (subtask, theirs)
        assert metrics[f"score/{subtask}"] == approx(expected["subtask_score"][subtask]), subtask
    assert metrics["perception"] == approx(expected["perception_total"])
    assert metrics["cognition"] == approx(expected["cognition_total"])
    assert metrics["perception"] + metrics["cognition"] == approx(expected["total"])
    assert metrics["count"] == len(answers)


@pytest.mark.parametrize(("folder", "count"), [("lavin_txt", 2374), ("llava-v1.5-7b_txt", 2350), (LLAVA_7B, 2368)])
def test_official_scores_of_result_folders(golden, template, expected, folder, count):
    alone = opened(golden / "mme" / folder)
    for benchmark in (alone, template):
        answers = benchmark.read_results(golden / "mme" / folder)
        assert len(answers) == count
        demand_official(benchmark, answers, expected[folder])
    assert len(alone.questions()) == count


def test_official_scores_of_llavas_answer_file(golden, template, expected):
    answers = {template.question_id(row): row["text"] for row in jsonl(golden / "mme" / "llava-v1.5-7b_answers.jsonl")}
    assert len(answers) == 2368
    demand_official(template, answers, expected[LLAVA_7B])


def test_every_edge_case_is_parsed_as_officially(golden, expected):
    rows = [(row["prediction"], row["official_label"]) for row in expected["edge_cases.jsonl"]]
    assert [answer for answer, _ in rows] == [row["prediction"] for row in jsonl(golden / "mme" / "edge_cases.jsonl")]
    assert len(rows) == 52
    for answer, label in [*rows, ("   no", "other"), ("  yes", "other")]:
        assert MME("nowhere").normalize(answer) == label, answer


def test_all_prompts_are_llavas(golden, template):
    theirs = jsonl(golden / "mme" / "llava_mme_questions.jsonl")
    assert len(template.questions()) == len(theirs) == 2374
    assert sum("/images/" in row["question_id"] for row in theirs) == 1834
    by_id = {question.id: question for question in template.questions()}
    for row in theirs:
        found = by_id.pop(template.question_id({"question_id": row["question_id"], "prompt": row["text"]}))
        assert (found.images, found.prompt) == ((row["image"].replace("/images/", "/"),), f"<image>\n{row['text']}"), row
        assert found.group == row["category"] and found.facts["question"].endswith(END), row
    assert not by_id


def release(root, images=2, apart=APART):
    """A release with so many pictures in each subtask; the first question about the second picture is one with No."""
    for subtask in SUBTASKS:
        suffix = ".png" if subtask in COGNITION else ".jpg"
        pictures = root / subtask / ("images" if subtask in apart else "")
        texts = root / subtask / ("questions_answers_YN" if subtask in apart else "")
        pictures.mkdir(parents=True, exist_ok=True)
        texts.mkdir(parents=True, exist_ok=True)
        for number in range(images):
            stem = f"{number:04}"
            pair = [f"Is {stem} of {subtask}?{END}\tYes\n", f"Is {stem} of nothing?{END}\tNo\n"]
            (pictures / f"{stem}{suffix}").write_bytes(f"{subtask} {stem}".encode())
            (texts / f"{stem}.txt").write_text("".join(pair[::-1] if number == 1 else pair))
    return root


def results(folder, benchmark, answer="Yes", suffix=None):
    folder.mkdir()
    for question in benchmark.questions():
        image = Path(question.images[0])
        cells = [image.stem + (suffix or image.suffix), question.facts["question"], question.reference, answer]
        with (folder / f"{question.group}.txt").open("a") as file:
            file.write("\t".join(cells) + "\n")
    return folder


@pytest.fixture
def made(tmp_path):
    return opened(release(tmp_path / "release"))


@pytest.fixture
def written(tmp_path, made):
    return results(tmp_path / "results", made)


def right(benchmark):
    return {question.id: question.reference for question in benchmark.questions()}


def test_questions_of_the_release(tmp_path):
    made = opened(release(tmp_path), pictures=True)
    by_id = {question.id: question for question in made.questions()}
    assert len(by_id) == len(made.questions()) == 56
    question = by_id["artwork/0001.jpg#1"]
    assert question.prompt == f"<image>\nIs 0001 of nothing?{LLAVA_END}"
    assert (question.images, question.reference, question.group) == (("artwork/0001.jpg",), "No", "artwork")
    assert question.facts == {"question": f"Is 0001 of nothing?{END}"}
    assert [made.worth(by_id[f"code_reasoning/0000.png#{number}"]) for number in (1, 2)] == [{"yes": 1.0}, {"no": 1.0}]
    assert made.read_image("artwork/0001.jpg") == b"artwork 0001"
    assert made.read_image("code_reasoning/0000.png") == b"code_reasoning 0000"
    assert made.describe() == f"MME in {tmp_path}; 56 questions instead of 2,374"


def test_scores_by_hand(made):
    answers = right(made)
    perfect = made.score(answers)
    assert (perfect["perception"], perfect["cognition"]) == (2000, 800)
    assert [name for name in perfect if "/" not in name] == ["perception", "cognition", "count"]
    assert made.headline in perfect and f"{made.by_group}/OCR" in perfect
    answers["OCR/0000.jpg#1"] = "It says so"  # other: 3 of 4 right, 1 of 2 pictures
    metrics = made.score(answers)
    assert [metrics[name] for name in ("score/OCR", "perception", "cognition", "count")] == [125, 1925, 800, 56]
    assert [metrics[f"{name}/OCR"] for name in FRACTIONS.values()] == [0.75, 0.5, 1, 1]
    for answer, perception, precision, recall in (("yes", 500, 0.5, 1), ("no", 500, 0, 0), ("maybe", 0, 0, 0)):
        metrics = made.score(dict.fromkeys(answers, answer))
        assert (metrics["perception"], metrics["cognition"]) == (perception, perception * 0.4), answer
        assert (metrics["precision/count"], metrics["recall/count"]) == (precision, recall), answer


def test_intervals_keep_subtasks_and_pairs_together(tmp_path):
    made = opened(release(tmp_path, images=4))
    answers = right(made) | {f"OCR/000{number}.jpg#1": "?" for number in (0, 1)}
    drawn = made.metrics(made.tally(made.questions(), answers).resampled(200))
    assert drawn["perception"].shape == (200,)
    assert set(np.unique(drawn["score/OCR"])) == {0 + 50, 75 + 12.5, 125, 150 + 12.5, 200}  # 4, 3, 2, 1 or no broken pair of 4
    np.testing.assert_allclose(drawn["perception"], 1800 + drawn["score/OCR"])
    np.testing.assert_array_equal(drawn["cognition"], 800)


def test_neither_order_nor_files_count(golden, template):
    answers = template.read_results(golden / "mme" / "lavin_txt")
    shuffled = list(answers.items())
    random.Random(0).shuffle(shuffled)
    assert list(dict(shuffled)) != list(answers)
    assert MME("nowhere").score(dict(shuffled), template.questions()[::-1]) == template.score(answers)


def test_missing_and_unknown_answers_are_named(made):
    answers = right(made)
    with pytest.raises(RecipeError, match=r"1 of 57 answers are to questions that were not asked: artwork/9\.jpg#1"):
        made.score(answers | {"artwork/9.jpg#1": "yes"})
    del answers["scene/0001.jpg#2"]
    with pytest.raises(RecipeError, match=r"1 of 56 questions have no answer: scene/0001\.jpg#2"):
        made.score(answers)
    with pytest.raises(RecipeError, match=r"two questions about a picture; not both were asked about scene/0001\.jpg"):
        made.score(answers, [question for question in made.questions() if question.id in answers])
    answers = {name: answer for name, answer in answers.items() if "scene/" not in name}
    with pytest.raises(RecipeError, match=r"all 14 subtasks, but nothing was asked of scene"):
        made.score(answers, [question for question in made.questions() if question.id in answers])


def test_drawn_by_picture_and_evenly(template):
    place = {question.id: number for number, question in enumerate(template.questions())}
    whole = Counter(question.group for question in template.questions())
    for limit in (28, 29, 30, 100, 700, 2373):
        drawn = template.draw(limit)
        places = [place[question.id] for question in drawn]
        assert places == sorted(set(places)) and len(places) == limit // 2 * 2
        assert set(Counter(question.images for question in drawn).values()) == {2}
        sizes = Counter(question.group for question in drawn)
        level = max(sizes.values())
        assert all(sizes[subtask] >= max(2, min(level - 2, whole[subtask])) for subtask in SUBTASKS), (limit, sizes)
    assert template.draw(100) == template.draw(100)
    assert template.draw(None) == template.draw(2374) == template.draw(9999) == template.questions()
    first = {question.group: question.images for question in reversed(template.questions())}
    assert {question.images for question in template.draw(28)} != set(first.values())
    for limit in (0, 1, 27):
        with pytest.raises(RecipeError, match=f"limit of {limit} questions .* at least 28"):
            template.draw(limit)


def test_rows_of_answer_files(tmp_path):
    made = opened(release(tmp_path), prompt="Q: {question} A:")
    assert made.questions()[0].prompt == "<image>\nQ: Is 0000 of existence? A:"
    assert made.question_id({"id": "scene/0000.jpg#2", "prompt": "anything", "answer": "no"}) == "scene/0000.jpg#2"
    row = {"question_id": "scene/images/0001.jpg", "prompt": f"Is 0001 of scene?{LLAVA_END}", "text": "Yes"}
    assert made.question_id(row) == made.question_id(row | {"question_id": "scene/0001.jpg"}) == "scene/0001.jpg#2"
    for wrong in ({"question_id": "scene/2.jpg"}, {"prompt": "Is 0001 of scene?"}, {"question_id": ""}, {"question_id": None}):
        with pytest.raises(RecipeError, match=r"no question for the row .*'text': 'Yes'"):
            made.question_id(row | wrong)
    with pytest.raises(RecipeError, match=r"no question for the row \{'text': 'Yes'\}"):
        made.question_id({"text": "Yes"})


def test_result_folders_of_llava_name_pictures_by_their_text_files(tmp_path, made):
    folder = results(tmp_path / "results", made, "  no", ".txt")
    assert made.read_results(folder) == dict.fromkeys(right(made), "  no")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0000.jpg\tIs it?\tYes", r"OCR\.txt line 5 has 3 cells separated by tabs instead of 4"),
        (f"0000.jpg\tIs it?{END}\tYes\tno", r"OCR\.txt line 5: .* no question 'Is it\? Please .*' about OCR/0000\.jpg"),
        (f"0000.jpg\tIs 0000 of OCR?{END}\tYes\tno", r"OCR\.txt line 5: OCR/0000\.jpg#1 is answered already"),
        (f"0000.jpg\tIs 0000 of OCR?{END}\tYes\tno\tbut", r"OCR\.txt line 5 has 5 cells"),
    ],
)
def test_broken_result_files(made, written, line, words):
    with (written / "OCR.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RecipeError, match=words):
        made.read_results(written)


@pytest.mark.parametrize("apart", [APART, set(), set(SUBTASKS)], ids=["official", "side by side", "apart"])
@pytest.mark.parametrize("inside", ["", "mme", "MME_Benchmark_release_version/MME_Benchmark"])
def test_all_layouts_give_the_same_questions(tmp_path, made, apart, inside):
    release(tmp_path / "other" / inside, apart=apart)
    for subtask in SUBTASKS:
        (tmp_path / "other" / "__MACOSX" / subtask).mkdir(parents=True)
    (tmp_path / "other" / inside / "count" / "._0000.txt").write_bytes(b"\xff")
    other = opened(tmp_path / "other", pictures=True)
    assert other.questions() == made.questions()
    assert other.read_image("posters/0000.jpg") == b"posters 0000"


def test_result_files_are_for_scoring_alone(tmp_path, made, written):
    bare = results(tmp_path / "bare", made)
    for file in bare.iterdir():
        file.write_text(file.read_text().replace("\tYes\n", "\n"))
    assert opened(bare).questions() == opened(written).questions() == made.questions()
    with pytest.raises(RecipeError, match=r"results holds result files without pictures.*darkyarding/MME"):
        opened(written, pictures=True)
    lines = (written / "color.txt").read_text().splitlines(keepends=True)
    (written / "color.txt").write_text("".join(lines[:-1]))
    with pytest.raises(RecipeError, match=r"color\.txt, 0001\.jpg: needs two different questions"):
        opened(written)
    (written / "color.txt").write_text("")
    with pytest.raises(RecipeError, match=r"results holds no questions of color"):
        opened(written)
    (written / "color.txt").unlink()
    with pytest.raises(RecipeError, match=r"results lacks color\.txt\. It holds .*OCR\.txt"):
        opened(written)
    with pytest.raises(RecipeError, match=r"results lacks color\.txt"):
        made.read_results(written)


def test_scoring_needs_no_pictures(made):
    root = Path(made.folder)
    for picture in [*root.rglob("*.jpg"), *root.rglob("*.png")]:
        picture.unlink()
    assert opened(root).questions() == made.questions()
    with pytest.raises(RecipeError, match=r"existence has no picture 0000\.jpg or \.png, about which .*0000\.txt asks.*MME"):
        opened(root, pictures=True)


def test_missing_folders(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere does not exist.*darkyarding/MME.*side by side"):
        opened(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"lacks existence, .*code_reasoning\. It holds no folders.*darkyarding/MME"):
        opened(tmp_path)
    root = release(tmp_path / "top" / "MME")
    (root / "OCR").rename(root / "ocr_new")
    with pytest.raises(RecipeError, match=r"top/MME lacks OCR\. It holds artwork, .*ocr_new.*darkyarding/MME"):
        opened(tmp_path)
    (root / "OCR" / "images").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"top/MME holds no questions of OCR"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", ONE, f"{ONE}Is that?\tYes\n", f"{ONE}Is that?\tNo\nIs he?\tNo\n", f"{ONE}Is it?\tNo\n", f"{ONE}Is that?\tperhaps\n"],
)
def test_questions_that_are_no_pair(made, content):
    Path(made.folder, "scene", "questions_answers_YN", "0000.txt").write_text(content)
    with pytest.raises(RecipeError, match=r"scene/.*/0000\.txt: needs two different questions, one with Yes and one with No"):
        opened(made.folder)


def test_line_ends_and_blank_lines_do_not_count_but_tabs_and_broken_bytes_do(made):
    file = Path(made.folder, "color", "0000.txt")
    file.write_bytes(file.read_bytes().replace(b"\n", b"  \r\n") + b"\r\n")
    assert opened(made.folder).questions() == made.questions()
    file.write_text(f"{ONE}Is that?{END} No\n")
    with pytest.raises(RecipeError, match=r"color/0000\.txt line 2 has 1 cells separated by tabs instead of 2"):
        opened(made.folder)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"color/0000\.txt cannot be read.*darkyarding/MME"):
        opened(made.folder)


def test_constructing_opens_nothing_but_needs_a_place():
    with pytest.raises(RecipeError, match=r"write \{question\}"):
        MME("no such folder", prompt="Yes or no?")


def test_the_recipe_states_everything():
    text = (Path(__file__).parents[3] / "recipes" / "benchmark" / "mme.yaml").read_text()
    stated = yaml.safe_load(text)["init_args"]
    assert set(stated) == set(signature(MME).parameters)
    assert MME(**stated).stated()["init_args"] == stated == MME(stated["folder"]).stated()["init_args"]
    assert f"# prompt hash: {MME(**stated).prompt_hash()}\n" in text
