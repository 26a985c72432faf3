"""Checkpoints that are complete or invisible: written under another name, made visible by one rename."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from components.errors import RecipeError
from components.run_folder import (
    BEST,
    CHECKPOINTS,
    RECIPE,
    STATE,
    UNFINISHED,
    checkpoint_folder,
    complete_checkpoints,
    find_checkpoint,
)

DELETED = ".deleted"


class Checkpoint(LightningCheckpoint):
    """A training run in, folders `checkpoints/step_N` out: weights, optimizer, position and recipe, on the way and at its end.

    Args:
        every_n_steps: Optimizer steps between checkpoints, >= 1, or null.
        every_n_minutes: Minutes between checkpoints, > 0, or null.
        keep: Newest checkpoints that are kept, >= 1; older ones are deleted.
        monitor: Score of a validation, such as `gqa/accuracy`, whose best checkpoint is kept besides and named in
            `checkpoints/best.json`; null keeps none.
        mode: Whether the best score is the largest (`max`) or the smallest (`min`).

    Raises:
        RecipeError: A value out of range, or a score that the validation does not have.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        keep: int = 2,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if (every_n_steps is not None and every_n_steps < 1) or (every_n_minutes is not None and every_n_minutes <= 0) or keep < 1:
            raise RecipeError(
                f"checkpoint: every_n_steps = {every_n_steps} and keep = {keep} must be at least 1, every_n_minutes = "
                f"{every_n_minutes} above 0, or null."
            )
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.last_step = -1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches: count them as if the run had accumulated all along as it does from now on."""
        self.last_step = checkpoint["global_step"]  # which is on disk
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        shift = checkpoint["global_step"] * trainer.accumulate_grad_batches - counts["ready"]
        counts.update({name: count + shift for name, count in counts.items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Minutes count from now; what a kill left half-done goes."""
        self.last_time = time.monotonic()
        checkpoints = Path(trainer.log_dir or ".") / CHECKPOINTS  # log_dir talks to all ranks
        if trainer.is_global_zero:
            for leftover in [*checkpoints.glob(f"step_*{UNFINISHED}"), *checkpoints.glob(f"*{DELETED}")]:
                shutil.rmtree(leftover)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save when it is due, and only between optimizer steps."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of a run that stops early is saved too."""
        self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A single process that is told to end saves first. Several would have to agree on a step, which a signal does not."""
        # not inside a validation: there the trainer has not finished its count of the step yet
        if isinstance(exception, SIGTERMException) and trainer.training and trainer.world_size == 1:
            self.save(trainer)

    def save_if_due(self, trainer: Trainer) -> None:
        """Save between two optimizer steps, if the steps or minutes say so. Called on all ranks."""
        if self._due(trainer):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of the step that the trainer has reached, unless it exists."""
        self.last_time = time.monotonic()
        if trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        run = Path(trainer.log_dir or ".")
        final = checkpoint_folder(run, trainer.global_step)
        unfinished = final.with_name(final.name + UNFINISHED)
        if trainer.is_global_zero:
            unfinished.mkdir(parents=True)
        trainer.strategy.barrier("checkpoint begins")
        trainer.save_checkpoint(unfinished / STATE, weights_only=False)
        trainer.strategy.barrier("checkpoint written")
        if trainer.is_global_zero:
            shutil.copy(run / RECIPE, unfinished / RECIPE)
            unfinished.rename(final)
            self._delete_old(run)
        trainer.strategy.barrier("checkpoint visible")

    def keep_best(self, trainer: Trainer, scores: dict[str, float]) -> None:
        """After a validation: keep the checkpoint of this step if no earlier score was as good. Called on all ranks."""
        if self.monitor is None:
            return
        if self.monitor not in scores:
            raise RecipeError(
                f"checkpoint.monitor = {self.monitor} is no score of this validation. Its scores: {', '.join(scores)}."
            )
        score = scores[self.monitor]
        run = Path(trainer.log_dir or ".")  # log_dir talks to all ranks
        # one rank decides: a file system may show the others an older best.json
        if not trainer.strategy.broadcast(trainer.is_global_zero and self._is_best(run, score)):
            return
        self.save(trainer)
        if trainer.is_global_zero:
            file = run / CHECKPOINTS / BEST
            unfinished = file.with_name(file.name + UNFINISHED)
            unfinished.write_text(
                json.dumps({"monitor": self.monitor, "mode": self.mode, "score": score, "step": trainer.global_step}) + "\n"
            )
            os.replace(unfinished, file)
            self._delete_old(run)
        trainer.strategy.barrier("best checkpoint named")

    def _is_best(self, run: Path, score: float) -> bool:
        best = _read_best(run)
        if best is None or (best["monitor"], best["mode"]) != (self.monitor, self.mode):
            return True
        return score > best["score"] if self.mode == "max" else score < best["score"]

    def _delete_old(self, run: Path) -> None:
        best = _read_best(run)
        spared = checkpoint_folder(run, best["step"]) if best and self.monitor else None
        for old in complete_checkpoints(run)[: -self.keep]:
            if old != spared:
                doomed = old.rename(old.with_name(old.name + DELETED))  # never half a checkpoint under a good name
                shutil.rmtree(doomed)

    def _due(self, trainer: Trainer) -> bool:
        if 0 <= trainer.max_steps <= trainer.global_step:  # now, before the benchmarks of the end may fail
            return True
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None:
            return False
        elapsed = time.monotonic() - self.last_time >= self.every_n_minutes * 60
        return trainer.strategy.broadcast(elapsed) if trainer.world_size > 1 else elapsed


def _read_best(run: Path) -> dict[str, Any] | None:
    """What `best.json` says; None where there is none, or where its checkpoint has gone."""
    try:
        find_checkpoint(run / CHECKPOINTS / BEST, "checkpoint.monitor")
    except RecipeError:
        return None
    best = json.loads((run / CHECKPOINTS / BEST).read_text())
    return best if {"monitor", "mode", "score", "step"} <= best.keys() else None
