"""Both kinds of annotation file, what is refused in them, and real ones."""

import json

import pytest

from components.benchmarks import Question, ShortAnswer, text_only_best
from components.benchmarks.report import Report
from components.errors import RecipeError


def row(**changes):
    return {"question_id": 1, "image": "a.png", "text": "how many", "answer": "2", "category": "count"} | changes


def llava(question="<image>\nis it true", **changes):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes"}]
    return {"id": "x", "image": "a.png", "group": "flags", "conversations": turns} | changes


def benchmark(folder, records, array=False):
    images = folder / "images"
    images.mkdir(exist_ok=True)
    (images / "a.png").write_bytes(b"picture a")
    file = folder / "eval.json"
    file.write_text(json.dumps(records) if array else "\n".join(json.dumps(record) for record in records) + "\n")
    made = ShortAnswer(str(file), str(images))
    made.setup()
    return made


def test_question_and_answer_rows(tmp_path):
    made = benchmark(tmp_path, [row(), {"image": "a.png", "text": "which", "answer": "b"}])
    assert made.questions() == [
        Question("1", "<image>\nhow many", ("a.png",), "2", "count"),
        Question("record 2", "<image>\nwhich", ("a.png",), "b", ""),
    ]
    assert made.read_image("a.png") == b"picture a"
    assert made.score({"1": "2", "record 2": "a"}) == {"accuracy": 0.5, "accuracy/count": 1.0, "count": 2.0}


@pytest.mark.parametrize("array", [True, False], ids=["JSON", "JSONL"])
def test_llava_conversations(tmp_path, array):
    without_group = llava("is it true\n<image>", id="y")
    del without_group["group"]
    several = llava("<image> or <image>?", id="z", image=["a.png", "a.png"])
    text_only = llava("what is 1 + 1", id="t")
    del text_only["image"]
    made = benchmark(tmp_path, [llava(), without_group, several, text_only], array)
    assert made.questions() == [
        Question("x", "<image>\nis it true", ("a.png",), "Yes", "flags"),
        Question("y", "<image>\nis it true", ("a.png",), "Yes", ""),
        Question("z", "<image> or <image>?", ("a.png", "a.png"), "Yes", "flags"),
        Question("t", "what is 1 + 1", (), "Yes", "flags"),
    ]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question_id": 2, "image": "a.png", "text": "how many"}, "answer missing or not a text"),
        (row(question_id=2, answer=3), "answer missing or not a text"),
        (row(question_id=2, category=["a"]), "`category` must be a text"),
        (row(question_id=2, text="<image> how many"), r"2 <image> placeholder\(s\) but 1 image\(s\)"),
        (row(image="b.png", question_id=2), "picture b.png is not in .*images .*1 of 2 pictures are missing"),
        (row(), "id 1 stands already in .*eval.json line 1"),
        (llava("is it true"), r"0 <image> placeholder\(s\) but 1 image\(s\)"),
        (llava(group=3), "`group` must be a text"),
        (llava(conversations=llava()["conversations"] * 2), "one question and one answer, but the conversation has 4 turns"),
        (llava(conversations=llava()["conversations"][:1]), "the conversation has 1 turns"),
    ],
)
def test_what_cannot_be_asked_names_file_and_line(tmp_path, record, words):
    with pytest.raises(RecipeError, match=rf"eval\.json line 2: .*{words}"):
        benchmark(tmp_path, [row(), record])


def test_a_missing_image_folder_says_which_key(tmp_path):
    file = tmp_path / "eval.jsonl"
    file.write_text(json.dumps(row()))
    with pytest.raises(RecipeError, match=r"The folder nowhere does not exist\. .*eval\.jsonl are relative to \(key images\)"):
        ShortAnswer(str(file), "nowhere").setup()


def test_a_picture_that_vanishes_is_named(tmp_path):
    made = benchmark(tmp_path, [row()])
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(RecipeError, match=r"images/a\.png cannot be read \(No such file"):
        made.read_image("a.png")


def test_the_recipe_says_which_differences_count(tmp_path):
    file = tmp_path / "eval.jsonl"
    file.write_text(json.dumps(row(answer="Two dogs.")) + "\n")
    for normalizer, scores in {"none": (0, 0), "short": (1, 0), "gqa": (1, 0), "vqa_v2": (1, 1), "evalai": (1, 1)}.items():
        made = ShortAnswer(str(file), str(tmp_path), normalizer=normalizer)
        made.setup(pictures=False)
        assert tuple(made.score({"1": answer})["accuracy"] for answer in ("two dogs", "the 2 dogs")) == scores, normalizer


def test_the_recipe_says_what_is_asked(tmp_path):
    file = tmp_path / "eval.jsonl"
    file.write_text(json.dumps(row()) + "\n")
    made = ShortAnswer(str(file), str(tmp_path), prompt="{question}\nBe brief.")
    made.setup(pictures=False)
    assert made.questions()[0].prompt == "<image>\nhow many\nBe brief."
    with pytest.raises(RecipeError, match="asks nothing: write {question}"):
        ShortAnswer(str(file), str(tmp_path), prompt="Be brief.")
    file.write_text(json.dumps(llava()) + "\n")
    with pytest.raises(RecipeError, match="line 1: conversations are asked as they are: `prompt` has no effect"):
        made.setup(pictures=False)


def test_constructing_opens_nothing():
    ShortAnswer("no such file", "no such folder")


def test_real_pictures_and_what_their_questions_give_away(realdata):
    folder = realdata / "nlvr"
    counting = ShortAnswer(str(folder / "eval_from_test_derived_qa.jsonl"), str(folder))
    counting.setup()
    assert len(counting.questions()) == 1980
    # counted from the file with other code: the majority of its own answers
    assert counting.score(text_only_best(counting, counting.questions()))["accuracy"] == pytest.approx(883 / 1980)
    # what a model that knows the text-only best, and the right answer about every fourth picture, would be shown to score
    pictures = sorted({question.images[0] for question in counting.questions()})
    best, known = text_only_best(counting, counting.questions()), set(pictures[::4])
    answers = {q.id: q.reference if q.images[0] in known else best[q.id] for q in counting.questions()}
    report = Report("nlvr", "at step 1", counting, counting.questions(), answers, 1980)
    heading, *rows = report.cells()
    assert heading == ["", "questions", "accuracy", "95% interval", "text-only best"]
    assert {row[0]: int(row[1]) for row in rows} == {
        "count_shape": 502,
        "count_colour": 498,
        "exist": 504,
        "count_all": 476,
        "all": 1980,
    }
    for _, _, accuracy, low_high, without_pictures in rows:
        low, high = map(float, low_high.split(" - "))
        assert float(without_pictures) < low < float(accuracy) < high

    statements = ShortAnswer(str(folder / "eval_from_test_llava.json"), str(folder))
    statements.setup()
    assert len(statements.questions()) == 5940
