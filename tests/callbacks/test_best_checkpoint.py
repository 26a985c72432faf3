"""The checkpoint with the best score of a validation outlives newer ones, and a restart knows it."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from test_validation import Brightness, Data, Model, trainer

from callbacks.checkpoint import Checkpoint
from callbacks.validation import Validation
from components.errors import RecipeError
from components.run_folder import BEST, CHECKPOINTS, RECIPE, checkpoint_folder, complete_checkpoints, find_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*smaller than the logging interval", "ignore:You're resuming from a checkpoint"
)


class Scripted(Model):
    """Wrong about as many questions as the script says for the optimizer step."""

    script: ClassVar[dict[int, int]] = {1: 3, 2: 1, 3: 2, 4: 5}

    def generate(self, documents, **options):
        self.says = {f"q{number}": "wrong" for number in range(self.script[self.trainer.global_step])}
        return super().generate(documents, **options)


def run(folder: Path, ckpt_path=None, **options):
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / RECIPE).write_text("model: scripted\n")
    asking = {name: options.pop(name) for name in ("every_n_steps", "at_start", "at_end", "limit") if name in options}
    validation = Validation({"squares": Brightness()}, **{"every_n_steps": 1, "at_start": True} | asking)
    checkpoint = Checkpoint(**{"every_n_steps": 1, "keep": 1} | options)
    one = trainer(folder, [validation, checkpoint])
    assert one.callbacks[-1] is checkpoint  # Lightning has checkpoints last
    one.fit(Scripted(), datamodule=Data(), ckpt_path=ckpt_path, weights_only=False)
    return folder / "run"


@pytest.fixture(autouse=True)
def no_answers_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Scripted.script, 0, 0)  # the best score of all, but of no training


def best(folder: Path) -> dict:
    return json.loads((folder / CHECKPOINTS / BEST).read_text())


def test_best_is_kept_beside_the_newest(tmp_path):
    folder = run(tmp_path, monitor="squares/accuracy")
    assert best(folder) == {"monitor": "squares/accuracy", "mode": "max", "score": 6 / 7, "step": 2}
    assert complete_checkpoints(folder) == [checkpoint_folder(folder, 2), checkpoint_folder(folder, 4)]
    assert find_checkpoint(folder, "--ckpt") == checkpoint_folder(folder, 4)
    assert find_checkpoint(folder / CHECKPOINTS / BEST, "--ckpt") == checkpoint_folder(folder, 2)


def test_the_smallest_may_be_the_best(tmp_path):
    assert best(run(tmp_path, monitor="squares/accuracy", mode="min"))["step"] == 4


def test_the_best_is_saved_where_no_checkpoint_is_due_and_can_be_continued_from(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(Checkpoint, "_due", lambda self, trainer: False)
    run(tmp_path, monitor="squares/accuracy")
    assert complete_checkpoints(folder) == [checkpoint_folder(folder, 2), checkpoint_folder(folder, 4)]  # the end is saved anyway
    shutil.rmtree(checkpoint_folder(folder, 4))
    run(tmp_path, find_checkpoint(folder / CHECKPOINTS / BEST, "--ckpt") / "state", monitor="squares/accuracy")
    assert complete_checkpoints(folder)[-1] == checkpoint_folder(folder, 4)


def test_a_validation_that_fails_loses_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Brightness, "broken", "pale.png")
    with pytest.raises(RecipeError, match=r"pale\.png"):
        run(tmp_path, at_start=False)
    assert complete_checkpoints(tmp_path / "run") == [checkpoint_folder(tmp_path / "run", 1)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 3}, r"Did you mean squares_partial/accuracy\?"),
        ({"every_n_steps": None, "at_end": False}, "has no effect: validation is due neither on the way nor at_end"),
    ],
)
def test_a_score_that_will_not_be_there_is_told_before_training(tmp_path, options, words):
    with pytest.raises(RecipeError, match=words):
        run(tmp_path, monitor="squares/accuracy", **options)
    assert not (tmp_path / "run" / CHECKPOINTS).exists()


def test_a_metric_that_is_no_score_names_those_there_are(tmp_path):
    with pytest.raises(
        RecipeError, match=r"squares/loss is no score of this validation\. .* Its scores are: squares/accuracy/dark, "
    ):
        run(tmp_path, monitor="squares/loss")


def test_a_damaged_note_of_the_best_is_told_and_replaced(tmp_path):
    folder = run(tmp_path, monitor="squares/accuracy")
    (folder / CHECKPOINTS / BEST).write_text("{")
    with pytest.raises(RecipeError, match=r"best\.json is damaged"):
        find_checkpoint(folder / CHECKPOINTS / BEST, "--ckpt")
    shutil.rmtree(checkpoint_folder(folder, 4))
    run(tmp_path, checkpoint_folder(folder, 2) / "state", monitor="squares/accuracy")
    assert best(folder)["step"] == 3


def test_without_a_monitor_nothing_is_best(tmp_path):
    folder = run(tmp_path)
    assert complete_checkpoints(folder) == [checkpoint_folder(folder, 4)]
    assert not (folder / CHECKPOINTS / BEST).exists()


def test_a_restart_keeps_the_best_of_before(tmp_path, monkeypatch):
    folder = run(tmp_path, monitor="squares/accuracy")
    shutil.rmtree(checkpoint_folder(folder, 4))  # as if the run had been killed after step 2
    monkeypatch.setattr(Scripted, "script", {2: 1, 3: 2, 4: 2})
    run(tmp_path, checkpoint_folder(folder, 2) / "state", monitor="squares/accuracy")
    assert best(folder)["step"] == 2
    shutil.rmtree(checkpoint_folder(folder, 4))
    monkeypatch.setattr(Scripted, "script", {2: 1, 3: 0, 4: 2})
    run(tmp_path, checkpoint_folder(folder, 2) / "state", monitor="squares/accuracy")
    assert best(folder) == {"monitor": "squares/accuracy", "mode": "max", "score": 1.0, "step": 3}
    assert checkpoint_folder(folder, 3) in complete_checkpoints(folder)


def test_a_validation_that_was_interrupted_is_made_up_for(tmp_path, monkeypatch):
    """Killed at step 2 between its checkpoint and its answers: the run goes on from step 2, and asks first."""
    options = {"monitor": "squares/accuracy", "at_start": False}
    folder = run(tmp_path, **options)
    shutil.rmtree(checkpoint_folder(folder, 4))
    (folder / CHECKPOINTS / BEST).unlink()
    record = folder / "validation/squares_step_2.json"
    before = json.loads(record.read_text())
    record.unlink()
    run(tmp_path, checkpoint_folder(folder, 2) / "state", **options)
    assert json.loads(record.read_text()) == before
    assert best(folder)["step"] == 2


def test_a_score_that_there_is_not_names_those_there_are(tmp_path):
    with pytest.raises(
        RecipeError, match=r"checkpoint\.monitor = gqa/accuracy is no score of this validation\. Did you mean squares/accuracy"
    ):
        run(tmp_path, monitor="gqa/accuracy")
