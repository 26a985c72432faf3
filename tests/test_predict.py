"""`python main.py predict`: a file of questions answered in LLaVA's format, and continued where it was interrupted."""

import json
from pathlib import Path

import pytest
import yaml
from small_recipe import fit, write_recipe

import main
from components.ask import ask
from components.shapes_world import Setting, draw_scene

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps and eleven questions about four pictures."""
    import numpy as np

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit(write_recipe(folder / "small.yaml")) == 0
    rows = []
    for number in range(4):
        random = np.random.default_rng(number)
        drawn = draw_scene(Setting(2, 1, 2, 16), random, held_out_pairs=False)
        (folder / f"{number}.bmp").write_bytes(drawn.picture())
        rows += [{"image": f"{number}.bmp", "text": question.text} for question in drawn.one_of_each_kind(random)]
    rows = [{"question_id": 100 + number, "category": "any"} | row for number, row in enumerate(rows[:11])]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def told(trained: Path) -> str:
    """The file of answers to all questions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        arguments = ["predict", "--config", "small.yaml", "--input", "questions.jsonl", "--output", "all/answers.jsonl"]
        assert main.main([*arguments, "--max_new_tokens", "5"]) == 0
    return (trained / "all/answers.jsonl").read_text()


@pytest.fixture
def predict(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command on a copy of the questions; its exit code and what it said."""
    monkeypatch.chdir(trained)
    capsys.readouterr()

    def predict(*options: str, questions: str = "questions.jsonl") -> tuple[int, str]:
        output = [] if "--output" in options else ["--output", str(tmp_path / "answers.jsonl")]
        arguments = ["predict", "--config", "small.yaml", "--input", questions, *output, "--max_new_tokens", "5", *options]
        code = main.main(arguments)
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return predict


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def test_answers_are_those_of_ask_in_the_order_of_the_questions(predict, trained, tmp_path):
    code, said = predict("--batch_size", "4")
    assert code == 0, said
    assert f"Score them: python main.py score --benchmark NAME --answers {tmp_path / 'answers.jsonl'}" in said
    asked, answered = rows(trained / "questions.jsonl"), rows(tmp_path / "answers.jsonl")
    assert [row["question_id"] for row in answered] == [row["question_id"] for row in asked]
    for question, answer in zip(asked[:4], answered[:4], strict=True):
        expected = ask("runs/small", question["text"], [question["image"]], max_new_tokens=5)
        assert answer == {
            "question_id": question["question_id"],
            "image": question["image"],
            "prompt": question["text"],
            "text": expected,
            "model_id": "small/step_00000004",
            "metadata": {"max_new_tokens": 5},
        }
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_an_interrupted_file_is_continued(predict, told, tmp_path):
    lines = told.splitlines()
    marked = json.loads(lines[3]) | {"text": "said before the interruption"}
    (tmp_path / "answers.jsonl.0.part").write_text("\n".join([json.dumps(marked), lines[0], lines[7][:30]]))
    (tmp_path / "answers.jsonl.5.part").write_text(lines[9] + "\n")  # of a rank that there is no more
    code, said = predict()
    assert code == 0
    assert "3 of 11 questions are answered already" in said
    again = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(again[3]) == marked
    assert again[:3] + again[4:] == lines[:3] + lines[4:]
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    code, said = predict()
    assert code == 0 and "11 of 11 questions are answered already" in said
    assert (tmp_path / "answers.jsonl").read_text().splitlines() == again


def test_answers_can_be_scored(told, trained, tmp_path, capsys):
    (tmp_path / "answers.jsonl").write_text(told)
    answers = {row["question_id"]: row["text"] for row in rows(tmp_path / "answers.jsonl")}
    known = [row | {"answer": answers[row["question_id"]]} for row in rows(trained / "questions.jsonl")]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    part = {"annotations": str(tmp_path / "known.jsonl"), "images": str(trained)}
    (tmp_path / "known.yaml").write_text(yaml.safe_dump({"class_path": "components.benchmarks.ShortAnswer", "init_args": part}))
    assert main.main(["score", "--benchmark", str(tmp_path / "known.yaml"), "--answers", str(tmp_path / "answers.jsonl")]) == 0
    assert "11     1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "how many"}, "line 1 answers question 100, which the input does not ask so"),
        ({"question_id": "17"}, "line 1 answers question 17, which the input does not ask so"),
        ({"image": "3.bmp"}, "line 1 answers question 100 with image '3.bmp' instead of '0.bmp'"),
        ({"model_id": "other/step_1"}, "line 1 answers question 100 with model_id 'other/step_1' instead of 'small/step_00000004'"),
        ({"metadata": {"max_new_tokens": 9}}, "with metadata {'max_new_tokens': 9} instead of {'max_new_tokens': 5}"),
        (None, "line 1 is no answer of this command"),
    ],
)
def test_answers_of_something_else_are_not_overwritten(predict, told, tmp_path, change, words):
    row = {"my": "file"} if change is None else json.loads(told.splitlines()[0]) | change
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    before = (tmp_path / "answers.jsonl").read_text()
    code, said = predict()
    assert code == 2
    assert words in said and "Name another --output" in said
    assert (tmp_path / "answers.jsonl").read_text() == before


def test_ids_that_repeat_and_odd_letters(predict, trained, tmp_path):
    """Both questions about a picture have one id in LLaVA's file for MME; some editors leave line separators in a text."""
    asked = [{"question_id": "a/0.png", "image": "0.bmp", "text": text} for text in ("how many\u2028now", "what color")]
    file = tmp_path / "twice.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    options = ("--images", str(trained), "--output", str(tmp_path / "x[1].jsonl"))
    assert predict(*options, questions=str(file))[0] == 0
    answered = rows(tmp_path / "x[1].jsonl")
    assert [(row["question_id"], row["prompt"]) for row in answered] == [(row["question_id"], row["text"]) for row in asked]
    code, said = predict(*options, questions=str(file))
    assert code == 0 and "2 of 2 questions are answered already" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["twice.jsonl", "x[1].jsonl"]


def test_places_that_cannot_be_written(predict, tmp_path, capsys):
    code, said = predict("--output", str(tmp_path))
    assert code == 2 and f"--output {tmp_path} is a folder" in said
    (tmp_path / "file").write_text("")
    code, said = predict("--output", str(tmp_path / "file/answers.jsonl"))
    assert code == 2 and "its folder cannot be made" in said
    assert main.main(["predict", "--config", "small.yaml", "--input", "questions.jsonl"]) == 2
    assert "--input FILE --output FILE" in capsys.readouterr().err


def test_questions_that_cannot_be_asked(predict, trained, tmp_path):
    def asked(**row) -> str:
        file = tmp_path / "questions.jsonl"
        file.write_text(json.dumps({"question_id": 1, "image": "0.bmp", "text": "how many"} | row) + "\n")
        code, said = predict("--images", str(trained), questions=str(file))
        assert code == 2
        return said

    assert "questions.jsonl line 1: image missing or not a text" in asked(image=3)
    assert "questions.jsonl line 1: picture 9.bmp is not in" in asked(image="9.bmp")
    (trained / "broken.bmp").write_bytes(b"BM nothing")
    assert "question 1 (how many) with picture broken.bmp: " in asked(image="broken.bmp")
    code, said = predict(questions="none.jsonl")
    assert code == 2 and "none.jsonl" in said
