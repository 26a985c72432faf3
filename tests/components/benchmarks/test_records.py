"""Answers written down, read again, scored and compared without a model: the commands `score` and `compare`."""

import json
import re
from pathlib import Path

import pytest
import yaml

import main
from components.benchmarks import Benchmark, Question, ShortAnswer
from components.benchmarks.records import read_answers, read_record
from components.benchmarks.report import Report
from components.errors import RecipeError

KINDS = ("count", "color")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty questions about thirty pictures that are not there: scoring needs none."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "question_id": f"q{i:02}",
            "image": f"{i // 2}.png",
            "text": f"{KINDS[i % 2]}?",
            "answer": str(i % 3),
            "category": KINDS[i % 2],
        }
        for i in range(60)
    ]
    Path("eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = {"class_path": "components.benchmarks.ShortAnswer", "init_args": {"annotations": "eval.jsonl", "images": "nowhere"}}
    Path("own.yaml").write_text(yaml.safe_dump(part))
    return tmp_path


def opened(**options: str) -> ShortAnswer:
    benchmark = ShortAnswer("eval.jsonl", "nowhere", **options)  # type: ignore[arg-type]
    benchmark.setup(pictures=False)
    return benchmark


def wrong_in(numbers: set[int]) -> dict[str, str]:
    return {f"q{i:02}": "x" if i in numbers else str(i % 3) for i in range(60)}


def recorded(name: str, answers: dict[str, str], benchmark: Benchmark | None = None, asked: list[Question] | None = None) -> Path:
    benchmark = benchmark or opened()
    asked = asked or benchmark.questions()
    report = Report("own", "at step 7", benchmark, asked, {q.id: answers[q.id] for q in asked}, 60)
    return report.write(Path(name), {"step": 7, "template": name})


def llava_file(name: str, answers: dict[str, str], order: int = 1) -> Path:
    rows = [{"question_id": key, "prompt": "", "text": text, "model_id": "m", "metadata": {}} for key, text in answers.items()]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows[::order]))
    return Path(name)


def told(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main.main(list(arguments))
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_a_record_holds_what_its_score_depends_on(files: Path) -> None:
    record = json.loads(recorded("a", wrong_in({0, 1, 2})).read_text())
    assert record["benchmark"] == {
        "class_path": "components.benchmarks.short_answer.ShortAnswer",
        "init_args": {"annotations": "eval.jsonl", "images": "nowhere", "prompt": "{question}", "normalizer": "short"},
    }
    assert (record["prompt"], record["normalizer"], record["version"]) == ("{question}", "short", "1")
    assert record["prompt_hash"] == opened().prompt_hash() != opened(prompt="{question}?").prompt_hash()
    assert record["headline"] == {"accuracy": 0.95}
    assert record["intervals"]["accuracy"][0] < 0.95 < record["intervals"]["accuracy"][1] <= 1
    assert record["metrics"] == {"accuracy": 0.95, "accuracy/count": 28 / 30, "accuracy/color": 29 / 30, "count": 60.0}
    assert record["text_only_best"]["accuracy"] == 20 / 60
    assert record["step"] == 7
    assert {"torch", "transformers", "numpy"} <= record["versions"].keys()


def test_a_record_scores_again_without_the_benchmarks_files(files: Path) -> None:
    path = recorded("a", wrong_in({4}))
    (files / "eval.jsonl").unlink()
    for name in (path, path.with_suffix(".jsonl")):
        record = read_record(name)
        assert record.benchmark.score(record.answers, record.asked) == record.facts["metrics"]


def test_score_reads_llavas_answers_in_any_order_and_twice(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = wrong_in(set(range(10)))
    expected = "all           60     0.833  0.700 - 0.967           0.333"
    for order in (1, -1):
        file = llava_file("answers.jsonl", answers, order)
        with file.open("a") as rows:
            rows.write(json.dumps({"question_id": "q05", "text": answers["q05"]}) + "\n")
        code, shown = told("score", "--benchmark", "own.yaml", "--answers", "answers.jsonl", capsys=capsys)
        assert code == 0
        assert shown.splitlines()[0] == "own from answers: eval.jsonl with pictures in nowhere"
        assert expected in shown.splitlines()


def test_score_writes_a_record_that_compares(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava_file("a.jsonl", wrong_in({0, 1, 2, 3, 4, 5}))
    llava_file("b.jsonl", wrong_in({0}))
    for name in "ab":
        code, _ = told("score", "--benchmark", "own.yaml", "--answers", f"{name}.jsonl", "--output", "out", capsys=capsys)
        assert code == 0
    code, shown = told("compare", "out/own_a.json", "out/own_b.json", capsys=capsys)
    assert code == 0
    lines = shown.splitlines()
    assert lines[0] == "own: eval.jsonl with pictures in nowhere"
    row = next(line for line in lines if line.startswith("accuracy ")).split()
    assert row[1:4] == ["0.900", "0.983", "+0.083"]
    low, high = float(row[4]), float(row[6])
    assert -0.02 <= low < 0.083 < high < 0.2
    assert [line.split()[0] for line in lines if line.startswith("accuracy")] == ["accuracy", "accuracy/count", "accuracy/color"]


def test_a_difference_is_paired(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models that are wrong about much the same pictures: apart, their intervals overlap; paired, they differ."""
    hard = {i for i in range(60) if i // 2 % 2}
    recorded("a", wrong_in(hard))
    recorded("b", wrong_in(hard - {2, 3, 6, 7, 10, 11, 14, 15}))
    code, shown = told("compare", "a/own_step_7.json", "b/own_step_7.jsonl", capsys=capsys)
    assert code == 0
    assert next(line for line in shown.splitlines() if line.startswith("accuracy ")).endswith("*")
    first, second = (read_record(Path(name, "own_step_7.json")).facts["intervals"]["accuracy"] for name in "ab")
    assert first[1] > second[0]
    assert "template differs: a and b" in shown
    same = told("compare", "a/own_step_7.json", "a/own_step_7.json", capsys=capsys)[1]
    assert re.search(r"accuracy +0\.\d+ +0\.\d+ +\+0\.000\n", same)  # no difference anywhere: no interval and no star


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"prompt": "{question}\nBe brief."},
            ["prompt_hash: ", "60 questions have another prompt, picture or reference: q00, q01"],
        ),
        ({"normalizer": "vqa_v2"}, ["normalizer: short and vqa_v2"]),
    ],
)
def test_other_prompts_and_scoring_are_not_compared_unless_told_to(files, options, words, capsys) -> None:
    recorded("a", wrong_in({0}))
    recorded("b", wrong_in({1}), opened(**options))
    code, shown = told("compare", "a/own_step_7.json", "b/own_step_7.json", capsys=capsys)
    assert code == 2
    assert "not comparable" in shown and all(word in shown for word in words) and "--anyway true" in shown
    code, shown = told("compare", "a/own_step_7.json", "b/own_step_7.json", "--anyway", "true", capsys=capsys)
    assert code == 0
    assert all(f"but {word}" in shown for word in words)


def test_other_questions_are_compared_over_those_in_common_when_told_to(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded("a", wrong_in({0}))
    recorded("b", wrong_in({1}), asked=opened().draw(20))
    code, shown = told("compare", "a/own_step_7.json", "b/own_partial_step_7.json", capsys=capsys)
    assert code == 2
    assert "40 questions are missing in b/own_partial_step_7.json" in shown
    code, shown = told("compare", "a/own_step_7.json", "b/own_partial_step_7.json", "--anyway", "true", capsys=capsys)
    assert code == 0
    assert "20 questions about" in shown


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"question_id": "q00", "text": "0"}], "59 of 60 questions have no answer: q01, q02, q03, q04, q05 and 54 more"),
        (
            [{"question_id": f"q{i:02}", "text": "0"} for i in range(61)],
            "1 of 61 answers are to questions that were not asked: q60",
        ),
        ([{"question_id": "q00", "text": "0"}, {"question_id": "q00", "text": "1"}], "different answers to the same question: q00"),
        ([{"question_id": "q00", "said": "0"}], "answers.jsonl line 1 has no text under answer, text, prediction"),
        ([{"image": "0.png", "text": "0"}], "line 1 does not say which question of the benchmark it answers: it has image, text"),
    ],
)
def test_answers_that_do_not_fit_are_named(files, rows, words, capsys) -> None:
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, shown = told("score", "--benchmark", "own.yaml", "--answers", "answers.jsonl", capsys=capsys)
    assert code == 2
    assert words in shown


def test_a_part_is_scored_when_told_to_and_called_so(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava_file("answers.jsonl", {"q00": "0", "q01": "x"})
    arguments = ["score", "--benchmark", "own.yaml", "--answers", "answers.jsonl", "--partial", "true"]
    code, shown = told(*arguments, capsys=capsys)
    assert code == 0
    assert shown.startswith("own_partial from answers: 2 of 60 questions, ")
    recorded("a", wrong_in({0}), asked=opened().draw(20))
    arguments = ["score", "--benchmark", "own.yaml", "--answers", "a/own_partial_step_7.jsonl"]
    assert told(*arguments, capsys=capsys)[1].startswith("own_partial from own_partial_step_7: 20 of 60 questions, ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["pope"], "own_step_7.json is of components.benchmarks.short_answer.ShortAnswer, not of components.benchmarks.pope.POPE"),
        (
            ["own.yaml", "--benchmark.prompt", "{question}!"],
            "'prompt': '{question}', 'normalizer': 'short'}. Give prompt and split as",
        ),
        (["own.yaml", "--partial", "true"], "--partial has no effect"),
    ],
)
def test_answers_of_a_validation_are_scored_as_what_they_are(files, options, words, capsys) -> None:
    path = recorded("a", wrong_in({0}))
    answers = str(path.with_suffix(".jsonl"))
    code, shown = told("score", "--benchmark", *options, "--answers", answers, capsys=capsys)
    assert code == 2 and words in shown
    code, shown = told("score", "--benchmark", "own.yaml", "--answers", answers, "--output", "again", capsys=capsys)
    assert code == 0
    again = json.loads(Path("again/own_own_step_7.json").read_text())
    assert (again["step"], again["template"], again["answers"]) == (7, "a", answers)
    assert again["versions"] == again["scored_with"]
    assert again["metrics"] == json.loads(path.read_text())["metrics"]


def test_what_is_no_record_and_no_answer_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recorded("a", wrong_in({0}))
    arguments = ["score", "--benchmark", "own.yaml", "--answers"]
    Path("taken").write_text("")
    shown = told(*arguments, str(path.with_suffix(".jsonl")), "--output", "taken", capsys=capsys)[1]
    assert "--output taken: no record can be written there" in shown
    edited = path.with_suffix(".edited")
    edited.write_text(path.with_suffix(".jsonl").read_text().replace('"answer": "', '"answer": "x'))
    assert re.search(r"all +60 +0\.000", told(*arguments, str(edited), capsys=capsys)[1])  # that file, not the one beside it
    assert "--answers nowhere.jsonl does not exist" in told(*arguments, "nowhere.jsonl", capsys=capsys)[1]
    assert "a is a folder, but the answers to eval.jsonl" in told(*arguments, "a", capsys=capsys)[1]
    assert "none.json does not exist" in told("compare", "none.json", str(path), capsys=capsys)[1]
    Path("cut.json").write_text(path.read_text()[:100])
    assert "cut.json is not valid JSON, perhaps truncated" in told("compare", str(path), "cut.json", capsys=capsys)[1]
    Path("other.json").write_text("{}")
    assert "other.json is not the record of a validation" in told("compare", str(path), "other.json", capsys=capsys)[1]
    Path("b.json").write_text(path.read_text().replace("ShortAnswer", "LongAnswer"))
    Path("b.jsonl").write_text(path.with_suffix(".jsonl").read_text())
    assert "b.json: its benchmark cannot be made again" in told("compare", str(path), "b.json", capsys=capsys)[1]
    with pytest.raises(RecipeError, match="There is no annotation file"):
        read_answers(Path("none.jsonl"), opened())
