"""A run that is told to end while benchmarks are asked ends between two batches of questions, and asks again when it continues."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from small_recipe import RECIPE, fit, write_recipe

from callbacks.validation.asking import Prompts
from components.run_folder import complete_checkpoints

BENCHMARK = {
    "class_path": "components.benchmarks.ShapesWorld",
    "init_args": {"setting": RECIPE["data"]["sources"]["shapes"]["init_args"]["setting"], "num_scenes": 4},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def test_told_to_end_in_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    validation = {"benchmarks": {"shapes": BENCHMARK}, "every_n_steps": 3, "batch_size": 2, "max_new_tokens": 2}
    recipe = write_recipe(tmp_path / "told.yaml", validation=validation, trainer={"enable_progress_bar": False})
    batches, prepare = [], Prompts.__getitem__

    def told(self: Prompts, number: int) -> Any:
        batches.append(number)
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, number)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(Prompts, "__getitem__", told)
        fit(recipe)
    assert exit_.value.code == 143
    assert batches == [0, 1]
    assert [folder.name for folder in complete_checkpoints(Path("runs/told"))] == ["step_00000002", "step_00000003"]
    assert "runs/told was told to end at step 3 and is saved at step 3" in capsys.readouterr().out
    answers = Path("runs/told/validation/shapes_step_3.jsonl")
    assert not answers.exists()
    assert fit(recipe) == 0
    assert answers.exists()
