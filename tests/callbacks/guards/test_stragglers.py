"""Who holds up the others: from the times that are a rank's own."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from lightning import Trainer

from callbacks.guards.stragglers import Stragglers, own_step_times, seconds_of_work


def test_a_rank_that_waits_for_its_data_makes_all_wait() -> None:
    # each computes for 1 s; the second waits 1 s for its data, so all take 2 s
    assert own_step_times(2.0, [0.0, 1.0, 0.0], [5.0, 5.0, 5.0]) == [1.0, 2.0, 1.0]


def test_a_slow_device_makes_all_wait() -> None:
    assert own_step_times(3.0, [1.0, 1.0, 1.0], [2.0, 2.0, 4.0]) == [2.0, 2.0, 3.0]


def test_equal_ranks_are_equal() -> None:
    assert own_step_times(2.0, [0.5, 0.5], [1.0, 1.0]) == [2.0, 2.0]


def test_work_takes_time() -> None:
    assert 0 < seconds_of_work(torch.device("cpu")) < 1


def look(stragglers: Stragglers, step: int, ranks: list[list[float]], run: Path) -> dict[str, float]:
    """A look at a step: seconds of the step, of its data and of the work, for each rank."""
    stragglers.steps, stragglers.data_wait = [ranks[0][0]] * stragglers.every_n_steps, 0.0
    stragglers.hosts = [f"node{rank // 2}" for rank in range(len(ranks))]
    trainer = Mock(spec=Trainer, global_step=step, world_size=len(ranks), is_global_zero=True)
    trainer.strategy.all_gather = lambda mine: torch.tensor(ranks, dtype=torch.float64)
    return stragglers.look(trainer, torch.device("cpu"), run)


def test_the_slowest_is_named_once_and_written_down_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stragglers = Stragglers(every_n_steps=5, ratio=1.5)
    equal = [[2.0, 0.1, 1.0]] * 4
    late = [*equal[:2], [2.0, 1.6, 1.0], equal[3]]
    assert look(stragglers, 4, equal, tmp_path) == {}  # not due
    assert look(stragglers, 5, equal, tmp_path) == pytest.approx({"time/data_wait": 0.1, "time/step_max_over_median": 1.0})
    assert not (tmp_path / "stragglers.jsonl").exists()
    for step in (10, 15):
        figures = look(stragglers, step, late, tmp_path)
        assert figures == pytest.approx({"time/data_wait": 0.475, "time/step_max_over_median": 4.0})
    entries = [json.loads(line) for line in (tmp_path / "stragglers.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["rank"], entry["host"], entry["ratio"]) for entry in entries] == [
        (10, 2, "node1", 4.0),
        (15, 2, "node1", 4.0),
    ]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and "rank 2 on node1 holds up the others" in told[0] and "4.00 times" in told[0]
