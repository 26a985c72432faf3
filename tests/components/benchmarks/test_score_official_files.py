"""`python main.py score` on answer files of LLaVA and the official tools: shuffled, doubled, incomplete, of something else."""

import json
import random
import shutil
from pathlib import Path

import pytest

import main

MME = "mme/ground_truth_template"
LLAVA_MME = "mme/llava-v1.5-7b_answers.jsonl"
POPE = ["--benchmark.folder", "pope/coco", "--benchmark.images", "none"]
GQA = ["--benchmark.folder", "gqa", "--benchmark.split", "ood_testdev_head"]
VIZWIZ = ["--benchmark.folder", "vizwiz", "--benchmark.split", "val"]

FILES = {
    "LLaVA, MME": ("mme", ["--benchmark.folder", MME, "--partial", "true"], LLAVA_MME, "perception", "1507.48"),
    "LLaVA, POPE": ("pope", [*POPE, "--benchmark.splits", "[random]"], "pope/llava-v1.5-13b.random.jsonl", "all", "0.871"),
    "LLaVA, GQA": ("gqa", GQA, "gqa/ood_testdev_head_llava-v1.5-13b_answers.jsonl", "all", "0.617"),
    "GQA": ("gqa", GQA, "gqa/ood_testdev_head_predictions.json", "all", "0.617"),
    "VizWiz": ("vizwiz", VIZWIZ, "vizwiz_vqa/pred_lfvqa_crowd_majority.json", "all", "0.927"),
}
"""Benchmark, options, answers, and a score that the official script gives."""


@pytest.fixture
def score(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command beside the golden data; its exit code and what it said."""
    for folder in ("mme", "pope", "gqa", "vizwiz_vqa"):
        (tmp_path / folder).symlink_to(golden / folder)
    (tmp_path / "vizwiz").mkdir()
    shutil.copy(golden / "vizwiz_vqa/annotations.json", tmp_path / "vizwiz/val.json")
    monkeypatch.chdir(tmp_path)

    def score(benchmark: str, *options: str) -> tuple[int, str]:
        code = main.main(["score", "--benchmark", benchmark, *options])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return score


def rows(file: str) -> list[dict]:
    text = Path(file).read_text()
    return json.loads(text) if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def rewritten(file: str, changed: list[dict]) -> str:
    name = f"changed{Path(file).suffix}"
    Path(name).write_text(json.dumps(changed) if file.endswith(".json") else "".join(json.dumps(row) + "\n" for row in changed))
    return name


def value(table: str, label: str) -> str:
    """The score in the row of that label: the third column, or the second where the row counts no questions."""
    line = next(line for line in table.splitlines() if line.startswith(f"{label} "))
    return next(cell for cell in line.split() if "." in cell)


@pytest.mark.parametrize("kind", FILES)
def test_files_in_order_shuffled_and_doubled(score, kind):
    benchmark, options, file, label, expected = FILES[kind]
    code, table = score(benchmark, *options, "--answers", file)
    assert (code, value(table, label)) == (0, expected), table
    changed = rows(file)
    doubled = changed + random.Random(0).sample(changed, 20)  # as ranks that repeat questions would write them
    random.Random(1).shuffle(doubled)
    code, again = score(benchmark, *options, "--answers", rewritten(file, doubled))
    assert (code, again.splitlines()[1:]) == (0, table.splitlines()[1:])


@pytest.mark.parametrize("kind", [kind for kind in FILES if "MME" not in kind])
def test_a_missing_answer_is_named(score, kind):
    benchmark, options, file, _, _ = FILES[kind]
    left = rows(file)
    gone = left.pop(7)
    code, said = score(benchmark, *options, "--answers", rewritten(file, left))
    assert code == 2
    name = str(gone.get("question_id") or gone.get("questionId") or gone["image"])
    assert f"1 of {len(left) + 1} questions have no answer: " in said and name.lstrip("1")[-4:].lstrip("0") in said
    assert "--partial true scores the others" in said


@pytest.mark.parametrize("kind", FILES)
def test_an_answer_to_something_else_is_named_with_its_line(score, kind):
    benchmark, options, file, _, _ = FILES[kind]
    changed = rows(file)
    key = next(key for key in ("question_id", "questionId", "image") if key in changed[0])
    changed[2] = changed[2] | {key: "99999999"}
    code, said = score(benchmark, *options, "--answers", rewritten(file, changed))
    assert code == 2
    assert said.startswith(("error: --answers changed.json", "error: changed.jsonl line 3: "))
    assert "99999999" in said


@pytest.mark.parametrize("results", ["lavin_txt", "llava-v1.5-7b_txt"])
def test_mmes_folder_of_results(score, golden, results):
    expected = json.loads((golden / "mme/EXPECTED.json").read_text())["expected"][results]
    code, table = score("mme", "--benchmark.folder", f"mme/{results}", "--answers", f"mme/{results}")
    assert code == 0 and table.startswith(f"mme from {results}: ")
    assert value(table, "perception") == f"{expected['perception_total']:.2f}"
    assert value(table, "cognition") == f"{expected['cognition_total']:.2f}"


def test_a_rescored_validation_is_described_as_it_was(score):
    options, file = FILES["LLaVA, MME"][1:3]
    assert "; 2,374 questions" not in score("mme", *options, "--answers", file, "--output", "out")[1]
    record = "out/mme_partial_llava-v1.5-7b_answers.json"
    assert main.main(["compare", record, record]) == 0
    assert "0 questions" not in score("mme", *options[:2], "--answers", record + "l")[1]


def test_gqas_file_may_answer_unbalanced_questions(score):
    options = ["--benchmark.folder", "gqa", "--benchmark.split", "edge", "--answers", "gqa/edge_predictions_as_is.json"]
    assert value(score("gqa", *options)[1], "all") == "0.333"
    assert value(score("gqa", *options, "--benchmark.normalizer", "none")[1], "all") == "0.067"


def test_a_model_that_never_says_yes_is_remarked(score):
    options, file = FILES["LLaVA, POPE"][1:3]
    never = rewritten(file, [row | {"text": "no"} for row in rows(file)])
    code, said = score("pope", *options, "--answers", never)
    assert code == 0
    assert "no answer to split random is yes: its precision and F1 are 0 by definition" in said


def test_a_benchmark_that_there_is_not(score):
    code, said = score("vizwizz", "--answers", "x.jsonl")
    assert code == 2 and "vizwizz is no file in recipes/benchmark/" in said and "Did you mean vizwiz?" in said
    assert main.main(["score", "--benchmark=mmee", "--answers", "x.jsonl"]) == 2
