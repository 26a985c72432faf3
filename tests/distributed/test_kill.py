"""Processes killed at any moment, saves included, and started again: the run ends with the bits of one that was left alone."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from lightning import Callback
from pair import fork
from small_recipe import write_recipe
from training_runs import slow

from components.run_folder import CHECKPOINTS, complete_checkpoints, visible_checkpoints

EVERY = 2
ACCUMULATE = 2
SLOW = 0.08
"""Seconds that every synchronization with the disk takes longer in a run that is to be killed; a save has several of them."""


class Pages(Callback):
    """A line for every micro-batch of every rank: its samples, its loss, and the loss of the optimizer step that it ends."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if os.environ.get("CRASH") == str(trainer.global_step):
            raise ZeroDivisionError("the test wants it so")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ends = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        page = {
            "rank": trainer.global_rank,
            "micro_batch": batch_idx,
            "samples": batch.sample_ids,
            "loss": outputs["loss"].item(),
            "step_loss": trainer.callback_metrics["train/loss"].item() if ends else None,
        }
        with (Path(trainer.log_dir or ".") / f"pages.{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(page) + "\n")


class Life(NamedTuple):
    """When a life of a run ends, and by whose death."""

    save: int
    """The save of this life that it ends around; 0: none, it ends some time after its first micro-batch."""
    seconds: float
    """After that has begun."""
    victim: int | None = None
    """The rank that is killed, whom the others miss; None: all at once."""


def recipe(path: Path, ranks: int, steps: int, accumulate: int = ACCUMULATE, **changes: Any) -> Path:
    """A run over all of `ranks`, with adapters whose dropout draws random numbers."""
    strategy = {
        "class_path": "components.sharding.HybridSharding",
        "init_args": {"replicas": 1, "shards": ranks, "param_dtype": "float32"},
    }
    trainer = {
        "devices": ranks,
        "strategy": strategy,
        "accumulate_grad_batches": accumulate,
        "callbacks": [{"class_path": "test_kill.Pages"}],
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
    }
    sections = {
        "trainer": trainer,
        "max_steps": steps,
        "data": {"global_batch_size": 8},
        "checkpoint": {"every_n_steps": EVERY},
        "guards": {"max_fruitless_starts": None},  # the kills here are many more than a run in the world may see
    }
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    return write_recipe(path, **sections)


ADAPTERS = {"decoder": {"init_args": {"lora": {"rank": 2, "alpha": 4.0, "dropout": 0.2}}}}


def fit(folder: str, recipe: str, run: str, delay: float, environment: dict[str, str]) -> None:
    """`python main.py fit` on this rank."""
    import warnings

    import main

    os.chdir(folder)
    os.environ.update(environment)
    with Path(f"log.{os.environ['LOCAL_RANK']}").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    synchronize = os.fsync

    def slowly(descriptor: int) -> None:
        time.sleep(delay)
        synchronize(descriptor)

    os.fsync = slowly
    sys.exit(main.main(["fit", "--config", recipe, "--run", run]))


def start(recipe: Path, run: str, ranks: int, delay: float = 0.0, **environment: str) -> list[Any]:
    return fork(fit, [(str(recipe.parent), str(recipe), run, delay, environment)] * ranks)


def finish(processes: list[Any], seconds: float = 300) -> list[int | None]:
    """The exit codes of processes; those that take longer are killed."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def finished(recipe: Path, run: str, ranks: int, **environment: str) -> None:
    codes = finish(start(recipe, run, ranks, **environment))
    assert codes == [0] * ranks, "\n".join((recipe.parent / f"log.{rank}").read_text()[-3000:] for rank in range(ranks))


def pages(run: Path) -> list[list[dict[str, Any]]]:
    """The pages of each rank."""
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(run.glob("pages.*.jsonl"))]


def killed(recipe: Path, run: str, ranks: int, life: Life) -> bool:
    """One life of a run, ended by SIGKILL on all ranks; whether that was in the middle of a save."""
    folder = recipe.parent / "runs" / run
    before, begun = pages(folder), set()
    processes = start(recipe, run, ranks, delay=SLOW)
    until = time.monotonic() + 120
    while all(process.is_alive() for process in processes) and time.monotonic() < until:
        begun |= {path.name for path in (folder / CHECKPOINTS).glob("step_*.unfinished")}
        if len(begun) >= life.save and (life.save or pages(folder) != before):
            break
        time.sleep(0.005)
    time.sleep(life.seconds)
    assert all(process.is_alive() for process in processes), "ended before it was killed"
    for process in processes if life.victim is None else [processes[life.victim]]:
        os.kill(process.pid, signal.SIGKILL)
    codes = finish(processes)
    assert 0 not in codes and -signal.SIGKILL in codes
    return bool(list((folder / CHECKPOINTS).glob("*.unfinished")))


def lives(number: int, seed: int, ranks: int) -> list[Life]:
    """Every other life ends around a save, the others at any time; at the end of every third, one rank dies before the others."""
    generator = np.random.default_rng(seed)
    ends = []
    for n in range(number):
        save = int(generator.integers(1, 3)) if n % 2 else 0
        victim = int(generator.integers(ranks)) if n % 3 == 2 else None
        ends.append(Life(save, float(generator.uniform(0, 10 * SLOW)), victim))
    return ends


def newest(run: Path) -> int:
    """The step of the newest complete checkpoint; nothing incomplete is visible."""
    assert visible_checkpoints(run) == complete_checkpoints(run)
    return max((int(folder.name.removeprefix("step_")) for folder in complete_checkpoints(run)), default=0)


def prove_killed_run(folder: Path, ranks: int, ends: list[Life], steps: int, **changes: Any) -> int:
    """A run that is killed so often, and one that is not: the same samples and losses. How many of the kills fell into a save."""
    path = recipe(folder / "recipe.yaml", ranks, steps, **changes)
    finished(path, "whole", ranks)
    expected = pages(folder / "runs/whole")
    assert [len(of_rank) for of_rank in expected] == [steps * ACCUMULATE] * ranks
    run = folder / "runs/killed"
    in_a_save, step = 0, 0
    written: list[list[dict[str, Any]]] = [[] for _ in range(ranks)]
    for life in [*ends, None]:
        if life is None:
            finished(path, "killed", ranks)
        else:
            in_a_save += killed(path, "killed", ranks, life)
        for rank, of_rank in enumerate(pages(run)):
            new = of_rank[len(written[rank]) :]
            first = step * ACCUMULATE  # the life has begun at the newest complete checkpoint of the one before
            assert new == expected[rank][first : first + len(new)]
            written[rank] = of_rank
        step = newest(run)
    assert step == steps
    assert all(page in of_rank for of_rank, theirs in zip(written, expected, strict=True) for page in theirs)
    return in_a_save


@pytest.mark.parametrize(
    "ends", [[Life(2, SLOW, victim=1)], slow([Life(1, 3 * SLOW), Life(2, 2 * SLOW, victim=1)])], ids=["once", "twice"]
)
def test_two_killed_processes_continue_to_the_same_bits(tmp_path: Path, ends: list[Life]) -> None:
    assert prove_killed_run(tmp_path, 2, ends, steps=6, model=ADAPTERS) >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ranks", "asynchronous"), [(20, 2, False), (6, 1, False), (8, 2, True), (4, 1, True)], ids=lambda value: str(value)
)
def test_killed_at_random_moments(tmp_path: Path, number: int, ranks: int, asynchronous: bool) -> None:
    ends = lives(number, seed=number, ranks=ranks)
    changes = {"model": ADAPTERS, "checkpoint": {"asynchronous": asynchronous, "every_n_steps": EVERY}}
    in_a_save = prove_killed_run(tmp_path, ranks, ends, steps=4 * number + 8, **changes)
    print(f"{in_a_save} of {number} kills fell into a save")
    assert in_a_save >= number // 4


@pytest.mark.slow
def test_two_ranks_then_one_then_four_are_one_process(tmp_path: Path) -> None:
    """The same samples in every optimizer step, and the same losses up to rounding."""
    steps = 8
    recipes = {ranks: recipe(tmp_path / f"{ranks}.yaml", ranks, steps, accumulate=1) for ranks in (1, 2, 4)}
    finished(recipes[1], "whole", 1)
    whole = pages(tmp_path / "runs/whole")[0]
    moved = {}
    for ranks, crash in ((2, 3), (1, 5), (4, None)):
        for file in (tmp_path / "runs/moved").glob("pages.*"):
            file.unlink()
        if crash is None:
            finished(recipes[ranks], "moved", ranks)
        else:
            assert 0 not in finish(start(recipes[ranks], "moved", ranks, CRASH=str(crash)))
        for of_step in zip(*pages(tmp_path / "runs/moved"), strict=True):
            moved[of_step[0]["micro_batch"]] = of_step
    assert [len(moved[step]) for step in range(steps)] == [2, 2, 1, 1, 4, 4, 4, 4]  # ranks, from the newest checkpoint on
    for step, page in enumerate(whole):
        assert sorted(name for of_rank in moved[step] for name in of_rank["samples"]) == sorted(page["samples"])
        assert {of_rank["step_loss"] for of_rank in moved[step]} == {moved[step][0]["step_loss"]}
        assert moved[step][0]["step_loss"] == pytest.approx(page["step_loss"], rel=1e-4)
