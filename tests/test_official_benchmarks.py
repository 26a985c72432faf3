"""GQA, MME, VizWiz-VQA and POPE inside a training run, from files in their official layouts."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from official_layouts import write_gqa, write_mme, write_pope, write_vizwiz
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main

ROOT = Path(__file__).parent.parent
QUICKSTART = ["fit", "--config", f"{ROOT}/recipes/quickstart.yaml"]
QUICK = "--validation.num_pictures 2 --data.num_workers 0"
HEADLINES = {"gqa": "accuracy", "mme": "perception", "vizwiz": "accuracy", "pope": "f1"}
RISES = ("gqa", "mme", "vizwiz")
"""From the first step on; to POPE's rules everything that is not a no is a yes, so that a model that babbles has an F1 of 0.67."""

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def write_all(folder: Path, **scenes: int) -> Path:
    """Benchmarks of drawn scenes, and the section of a recipe that asks them as the model was taught to be asked."""
    plain = {"prompt": "{question}"}
    parts = {
        "gqa": ("GQA", {"folder": str(write_gqa(folder / "gqa", scenes["gqa"]))} | plain),
        "mme": ("MME", {"folder": str(write_mme(folder / "mme", scenes["mme"]))} | plain),
        "vizwiz": ("VizWiz", {"folder": str(write_vizwiz(folder / "vizwiz", scenes["vizwiz"])), "capitalize": False} | plain),
        "pope": (
            "POPE",
            {"folder": str(write_pope(folder / "pope", scenes["pope"])), "images": str(folder / "pope/val2014")} | plain,
        ),
    }
    benchmarks = {
        name: {"class_path": f"components.benchmarks.{kind}", "init_args": options} for name, (kind, options) in parts.items()
    }
    file = folder / "official.yaml"
    file.write_text(yaml.safe_dump({"benchmarks": benchmarks, "every_n_steps": None, "at_end": True}))
    return file


def series(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def record(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "validation" / f"{name}.json").read_text())


def test_scores_of_official_layouts_rise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The start of the quickstart, in small batches: it learns to say words of the right kind, then the commonest of them."""
    monkeypatch.chdir(tmp_path)
    validation = write_all(tmp_path, gqa=12, mme=1, vizwiz=30, pope=3)
    short = "--max_steps 30 --warmup.fraction 0.1 --validation.every_n_steps 30 --validation.at_start true --run short"
    short += f" --data.global_batch_size 8 --validation.max_new_tokens 4 {QUICK}"
    assert main.main([*QUICKSTART, "--validation", str(validation), *short.split()]) == 0
    run = tmp_path / "runs/short"
    for name, headline in HEADLINES.items():
        scores = series(run, f"{name}/{headline}")
        assert [step for step, _ in scores] == [0, 30]
        assert name not in RISES or scores[1][1] > scores[0][1], name
        assert series(run, f"{name}/count")[1][1] == record(run, f"{name}_step_30")["metrics"]["count"]
    shown = capsys.readouterr().out
    assert "gqa at step 30: GQA testdev_balanced\n" in shown
    assert "consistency is not available: " in shown
    kept = record(run, "mme_step_30")
    assert (kept["prompt"], kept["partial"], kept["metrics"]["count"]) == ("{question}", False, 28.0)

    recipe = (run / "recipe.yaml").read_bytes()
    assert kept["recipe_hash"] == hashlib.blake2b(recipe, digest_size=16).hexdigest()
    assert (kept["decoding"]["max_new_tokens"], kept["template"]) == (4, "brief")

    # the same answers, scored without the model, and the difference between two steps
    answers = [f"runs/short/validation/mme_step_{step}.jsonl" for step in (0, 30)]
    options = ["--benchmark.folder", str(tmp_path / "mme"), "--benchmark.prompt", "{question}"]
    score = ["score", "--benchmark", "components.benchmarks.MME", *options, "--answers"]
    assert main.main([*score, answers[1]]) == 0
    assert f"{kept['metrics']['perception']:.2f}" in capsys.readouterr().out
    assert main.main(["compare", *answers]) == 0
    assert "cognition" in capsys.readouterr().out


def test_a_limit_draws_mme_by_picture_and_is_called_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    validation = write_all(tmp_path, gqa=12, mme=3, vizwiz=40, pope=8)
    short = f"--max_steps 2 --warmup.fraction 0 --validation.limit 30 --validation.max_new_tokens 2 --run short {QUICK}"
    assert main.main([*QUICKSTART, "--validation", str(validation), *short.split()]) == 0
    rows = [json.loads(line) for line in Path("runs/short/validation/mme_partial_step_2.jsonl").read_text().splitlines()]
    assert len(rows) == 30
    images = [row["images"][0] for row in rows]
    assert all(images.count(image) == 2 for image in images)
    assert len({row["group"] for row in rows}) == 14
    assert record(Path("runs/short"), "mme_partial_step_2")["questions"] == 84
    for name in ("gqa", "vizwiz", "pope"):
        kept = record(Path("runs/short"), f"{name}_partial_step_2")
        assert (kept["partial"], kept["metrics"]["count"]) == (True, kept["questions_asked"])


def test_a_limit_that_leaves_no_score_is_refused_before_training(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    validation = write_all(tmp_path, gqa=2, mme=1, vizwiz=2, pope=1)
    assert main.main([*QUICKSTART, "--validation", str(validation), "--validation.limit", "20"]) == 2
    said = capsys.readouterr().err
    assert "validation.benchmarks.mme: MME: a limit of 20 questions leaves subtasks out. Make it at least 28." in said


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda folder: (folder / "mme/MME_Benchmark_release_version/color").rename(folder / "mme/colour"), "lacks color"),
        (lambda folder: cut(folder / "gqa/testdev_balanced_questions.json"), "testdev_balanced_questions.json is not valid JSON"),
        (lambda folder: (folder / "vizwiz/val/VizWiz_val_00000001.jpg").unlink(), "lacks 1 of 3 pictures, VizWiz_val_00000001.jpg"),
        (lambda folder: cut(folder / "pope/coco_pope_popular.json"), "coco_pope_popular.json line 4 is not valid JSON"),
    ],
)
def test_broken_files_are_told_before_training(tmp_path, monkeypatch, capsys, breaks, words) -> None:
    monkeypatch.chdir(tmp_path)
    validation = write_all(tmp_path, gqa=2, mme=1, vizwiz=3, pope=2)
    breaks(tmp_path)
    assert main.main([*QUICKSTART, "--validation", str(validation)]) == 2
    said = capsys.readouterr().err
    assert words in said and "validation.benchmarks." in said
    assert "Traceback" not in said


def cut(file: Path) -> None:
    text = file.read_text()
    file.write_text(text[: len(text) - 20])


def test_vizwiz_test_gives_a_file_for_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_vizwiz(tmp_path / "vizwiz", 6, split="test")
    part = {"class_path": "components.benchmarks.VizWiz", "init_args": {"folder": str(folder), "split": "test"}}
    file = tmp_path / "upload.yaml"
    file.write_text(yaml.safe_dump({"benchmarks": {"upload": part}, "at_end": False, "shuffled_pictures": True}))
    assert main.main([*QUICKSTART, "--max_steps", "1", "--warmup.fraction", "0", "--validation", str(file), "--run", "one"]) == 0
    test = [
        "test",
        "--config",
        f"{ROOT}/recipes/quickstart.yaml",
        "--validation",
        str(file),
        "--ckpt_path",
        "runs/one",
        "--run",
        "one",
    ]
    assert main.main(test) == 0
    upload = json.loads(Path("runs/one/validation/upload_step_1.upload.json").read_text())
    assert [row["image"] for row in upload] == [f"VizWiz_test_{number:08}.jpg" for number in range(6)]
    assert all(isinstance(row["answer"], str) for row in upload)
    shown = capsys.readouterr().out
    assert "accuracy is not available: " in shown
    assert "Answers and records: runs/one/validation" in shown and "python main.py compare RECORD RECORD" in shown


@pytest.mark.slow
def test_the_whole_quickstart_is_scored_by_the_official_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    validation = write_all(tmp_path, gqa=250, mme=12, vizwiz=400, pope=60)
    assert main.main([*QUICKSTART, "--validation", str(validation), "--validation.every_n_steps", "500", "--run", "whole"]) == 0
    run = tmp_path / "runs/whole"
    for name, headline in HEADLINES.items():
        scores = series(run, f"{name}/{headline}")
        assert [step for step, _ in scores] == [500, 1000, 1500]
        assert name not in RISES or scores[2][1] > scores[0][1], (name, scores)
    assert series(run, "gqa/accuracy")[2][1] > 0.9
    assert series(run, "mme/perception")[2][1] > 1700
