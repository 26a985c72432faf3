"""A run that is told to end while it loads or asks benchmarks; in the midst of steps: tests/test_resume.py."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from small_recipe import RECIPE, fit, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.validation.asking import Prompts
from components.run_folder import complete_checkpoints
from components.vlm import VisionLanguageModel

BENCHMARK = {
    "class_path": "components.benchmarks.ShapesWorld",
    "init_args": {"setting": RECIPE["data"]["sources"]["shapes"]["init_args"]["setting"], "num_scenes": 4},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def losses(run: Path) -> list[int]:
    """Steps whose loss TensorBoard shows."""
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.step + 1 for event in events.Scalars("train/loss")] if "train/loss" in events.Tags()["scalars"] else []


@pytest.mark.parametrize(
    ("when", "step", "checkpoints"),
    [
        ({"every_n_steps": 3, "at_end": False}, 3, ["step_00000002", "step_00000003"]),
        pytest.param({"at_start": True, "at_end": False}, 0, [], marks=pytest.mark.slow),
        pytest.param({"at_end": True}, 4, ["step_00000002", "step_00000004"], marks=pytest.mark.slow),
    ],
)
def test_told_to_end_in_a_validation(
    when: dict[str, Any],
    step: int,
    checkpoints: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    validation = {"benchmarks": {"shapes": BENCHMARK}, "batch_size": 2, "max_new_tokens": 2, **when}
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
    run = Path("runs/told")
    assert [folder.name for folder in complete_checkpoints(run)] == checkpoints
    assert f"{run} was told to end at step {step} and is {'' if step else 'not '}saved" in capsys.readouterr().out
    assert losses(run) == list(range(1, step + 1))
    answers = run / f"validation/shapes_step_{step}.jsonl"
    assert not answers.exists()
    assert fit(recipe) == 0
    assert losses(run) == [1, 2, 3, 4]
    if step < 4:
        assert answers.exists()  # it is asked again
    else:
        assert "Not every benchmark was asked at its end" in capsys.readouterr().out


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_end_before_the_first_step(by: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    monkeypatch.setattr(VisionLanguageModel, "configure_model", lambda self: os.kill(os.getpid(), by))
    with pytest.raises(SystemExit) as exit_:
        fit(write_recipe(tmp_path / "told.yaml", trainer={"enable_progress_bar": False}))
    assert exit_.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    lines = [json.loads(line) for line in Path("runs/told/starts.jsonl").read_text().splitlines()]
    assert [line.get("end") for line in lines] == [None, "told to end"]
