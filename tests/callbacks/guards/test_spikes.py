"""Spikes: a step whose loss or norm jumps out is written down with the samples it had, and nothing else happens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from lightning import Callback, Trainer
from tiny import Prepared, tiny_document, tiny_model, tiny_trainer

from callbacks.guards import Guards
from callbacks.guards.records import Samples
from callbacks.guards.spikes import Running, Spikes
from components.batch import Batch, pack
from components.optimizer_step import OptimizerStep


def test_running_mean_and_deviation_are_those_of_the_numbers() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.5, 2000)
    running = Running()
    above = [running.take(value) for value in values]
    assert above[:50] == [0.0] * 50
    weights = 0.98 ** np.arange(2000)[::-1]
    assert running.mean == pytest.approx(np.average(values, weights=weights), abs=0.02)
    assert running.variance**0.5 == pytest.approx(0.5, rel=0.25)
    assert max(above) < 6
    assert running.take(running.mean + 7 * running.variance**0.5) == pytest.approx(7)


def test_a_new_level_is_a_spike_once() -> None:
    running = Running()
    for _ in range(60):
        assert running.take(1.0) == 0.0
    assert running.take(2.0) > 6
    assert [running.take(2.0) > 6 for _ in range(20)].count(True) <= 3


class Jump(Callback):
    """The loss of one step is ten times as large."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        loss_sum = pl_module.loss_sum
        pl_module.loss_sum = lambda batch: loss_sum(batch) * (10 if trainer.global_step == self.step else 1)


def batches(steps: int) -> list[Batch]:
    documents = [replace(tiny_document(5, seed=number), sample_id=f"sample {number}") for number in range(2 * steps)]
    return [pack([document]) for document in documents]


def test_a_spike_is_written_down_with_its_samples(tmp_path: Path) -> None:
    trainer = tiny_trainer(2, callbacks=[Jump(53), Guards()], default_root_dir=tmp_path)
    trainer.fit(tiny_model(), datamodule=Prepared(batches(56)))
    entries = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [54]
    entry = entries[0]
    assert entry["loss"] > 5 * entry["expected_loss"] and entry["norm"] > 3 * entry["expected_norm"]
    assert [micro_batch["samples"] for micro_batch in entry["ranks"][0]] == [["sample 106"], ["sample 107"]]


def test_nothing_is_looked_for_where_the_recipe_says_null() -> None:
    spikes, model = Spikes(None), tiny_model()
    trainer = Mock(spec=Trainer, lightning_module=model, global_step=1)
    for loss in [1.0] * 60 + [100.0]:
        spikes.take(trainer, OptimizerStep(loss, 1.0, 0.0, 0.0, loss), Samples(), Path("nowhere"))
        assert not model.wishes.report
