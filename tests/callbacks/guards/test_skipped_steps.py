"""Steps that are not finite: written down with their samples, counted across restarts, and stopped when they are too many."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from tiny import Prepared, Record, tiny_document, tiny_model, tiny_trainer, weights

from callbacks.checkpoint import Checkpoint
from callbacks.guards import Guards
from components.batch import Batch, pack
from components.errors import RecipeError
from components.run_folder import RECIPE, complete_checkpoints

STEPS = 6


class Poison(Callback):
    """Makes the loss of some micro-batches infinite."""

    def __init__(self, micro_batches: set[int]) -> None:
        self.micro_batches = micro_batches
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        loss_sum = pl_module.loss_sum
        pl_module.loss_sum = lambda batch: loss_sum(batch) * (math.inf if self.number in self.micro_batches else 1)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.number = batch_idx

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx % 2:
            self.weights.append(weights(pl_module))


def batches() -> list[Batch]:
    return [pack([tiny_document(5 + number, seed=number), tiny_document(9, (1,), number)]) for number in range(2 * STEPS)]


def train(folder: Path, poisoned: set[int], most: int, **options: Any) -> tuple[Poison, Record]:
    poison, record = Poison(poisoned), Record()
    (folder / RECIPE).write_text("model: tiny\n")
    callbacks = [poison, Guards(max_skipped_steps=most), Checkpoint(every_n_steps=1, keep=9), record]
    options |= {"callbacks": callbacks, "enable_checkpointing": True, "default_root_dir": folder}
    trainer = tiny_trainer(2, **options)
    trainer.fit(tiny_model(), datamodule=Prepared(batches()))
    return poison, record


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped_steps.jsonl").read_text().splitlines()]


def test_skipped_steps_are_counted_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poison, record = train(tmp_path, {3, 8, 9}, most=2)
    assert [step.get("train/skipped_steps", 0) for step in record.steps] == [0, 1, 1, 1, 2, 2]
    first, second = lines(tmp_path)
    assert (first["step"], second["step"]) == (2, 5)
    assert first["loss"] == "inf" and first["norm"] in ("nan", "inf")
    own, poisoned = first["ranks"][0]
    assert own["samples"] == batches()[2].sample_ids and poisoned["samples"] == batches()[3].sample_ids
    assert 0 < own["loss"] < 20 and poisoned["loss"] == "inf"
    assert "step 2 is skipped" in capsys.readouterr().out
    assert all(torch.equal(tensor, poison.weights[0][name]) for name, tensor in poison.weights[1].items())


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="last 2 optimizer steps") as error:
        train(tmp_path, {0, 4, 6}, most=2)
    for words in ("guards.max_skipped_steps = 2", "skipped_steps.jsonl", "gradient_clip_val", "learning_rates"):
        assert words in str(error.value)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 4]
    last = complete_checkpoints(tmp_path)[-1]  # of step 3: its weights are those of step 2
    saved = [torch.load(folder / "state", weights_only=False) for folder in (last, last.with_name("step_00000002"))]
    assert saved[0]["global_step"] == 3 and saved[0]["callbacks"]["Guards"] | {"spikes": 0} == {
        "skipped": 2,
        "in_a_row": 1,
        "spikes": 0,
    }
    assert all(torch.equal(tensor, saved[1]["state_dict"][name]) for name, tensor in saved[0]["state_dict"].items())


@pytest.mark.parametrize(
    "values",
    [
        {"max_skipped_steps": 0},
        {"spike_deviations": 0.0},
        {"step_timeout_minutes": 0.0},
        {"straggler_every_n_steps": 0},
        {"straggler_ratio": 1.0},
        {"max_fruitless_starts": 0},
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(values))):
        Guards(**values)
