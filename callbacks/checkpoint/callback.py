"""When checkpoints are written, which are kept, and what happens when the disk refuses."""

import json
import os
import shutil
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.checkpoint.canary import CANARY, try_checkpoint, verify
from callbacks.checkpoint.saving import GIB, Saving, first_problem, size
from components.errors import RecipeError
from components.manifest import synchronize, synchronize_folder, what_is_missing
from components.phases import phase
from components.run_folder import (
    BEST,
    CHECKPOINTS,
    UNFINISHED,
    checkpoint_folder,
    complete_checkpoints,
    find_checkpoint,
    visible_checkpoints,
)

DAMAGED = ".damaged"
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
        asynchronous: Whether checkpoints on the way are written while training goes on, from a copy in the memory of the CPU. They
            become visible at the end of a later step.
        canary: Whether a checkpoint is written, loaded and removed before the first step, so that a disk that is full, read-only or
            too small for `keep` of them ends the run at once.
        max_failed_saves: Checkpoints in a row that may fail to be written, each after three tries, before the run ends, >= 1.

    Raises:
        RecipeError: A value out of range, a score that the validation does not have, or a disk that takes no checkpoint.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        keep: int = 2,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        asynchronous: bool = False,
        canary: bool = True,
        max_failed_saves: int = 3,
    ) -> None:
        numbers = {"every_n_steps": every_n_steps, "keep": keep, "max_failed_saves": max_failed_saves}
        if wrong := {name: number for name, number in numbers.items() if number is not None and number < 1}:
            raise RecipeError(f"checkpoint: {wrong} must be at least 1.")
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise RecipeError(f"checkpoint: every_n_minutes = {every_n_minutes} must be above 0, or null.")
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.asynchronous = asynchronous
        self.canary = canary
        self.max_failed_saves = max_failed_saves
        self.saved_step = -1
        self.tried_step = -1
        self.failed_saves = 0
        self.saving: Saving | None = None

    # --- start and end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before a run continues: its newest checkpoint is what was written."""
        if stage == "fit":
            run = Path(trainer.log_dir or ".")  # log_dir talks to all ranks
            # one rank looks: a file system may show the others an older folder
            newest = trainer.strategy.broadcast(complete_checkpoints(run)[-1:] if trainer.is_global_zero else [])
            elsewhere = trainer.ckpt_path != trainer.strategy.broadcast(trainer.ckpt_path)
            if problem := first_problem(trainer, f"it sees {trainer.ckpt_path or 'no checkpoint'}" if elsewhere else None):
                raise RecipeError(
                    f"checkpoint: {run / CHECKPOINTS} is not the same for every rank, which would continue from different steps: "
                    f"{problem}. Let all nodes share the folder; if they do, start again in a minute, when they have seen it anew."
                )
            self.continues = bool(newest)
            for checkpoint in newest:
                verify(trainer, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What an earlier start left half-done goes; then the disk is tried."""
        run = Path(trainer.log_dir or ".")  # log_dir talks to all ranks
        if trainer.is_global_zero:
            _tidy(run)
        trainer.strategy.barrier("checkpoints tidied")
        if self.canary and not self.continues:
            with phase("checkpoint"):
                try_checkpoint(trainer, run, self._at_once(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Minutes count from now."""
        self.last_time = time.monotonic()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches: count them as if the run had accumulated all along as it does from now on."""
        self.saved_step = checkpoint["global_step"]
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        shift = checkpoint["global_step"] * trainer.accumulate_grad_batches - counts["ready"]
        counts.update({name: count + shift for name, count in counts.items()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save when it is due, and only between optimizer steps."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            if self.saving is not None and self.saving.is_written():
                self._finish(trainer)
            self.save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of a run that stops early is saved too; what cannot be saved now is lost."""
        self._finish(trainer)
        if self.saved_step != trainer.global_step:
            self.tried_step, self.failed_saves = -1, self.max_failed_saves - 1
            self._save(trainer, asynchronous=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A single process ends what it writes; several would have to agree on it. The guards see to signals."""
        if trainer.world_size == 1:
            self._finish(trainer)

    # --- saving

    def save_if_due(self, trainer: Trainer) -> None:
        """Save between two optimizer steps, if the steps or minutes say so. Called on all ranks."""
        if self._due(trainer):
            self._save(trainer, self.asynchronous and trainer.global_step != trainer.max_steps)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of the step that the trainer has reached, unless it exists, and wait for it. Called on all ranks."""
        self._save(trainer, asynchronous=False)
        self._finish(trainer)

    def _save(self, trainer: Trainer, asynchronous: bool) -> None:
        self.last_time = time.monotonic()
        if trainer.global_step in (self.saved_step, self.tried_step):
            return
        self._finish(trainer)
        self.tried_step = trainer.global_step
        run = Path(trainer.log_dir or ".")  # log_dir talks to all ranks
        with phase("checkpoint"):
            self.saving = Saving(trainer, run, checkpoint_folder(run, trainer.global_step), asynchronous)
        if not asynchronous:
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        """Wait for the checkpoint that is being written, if one is, and make it visible. Called on all ranks."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            with phase("checkpoint"):
                self._end(trainer, saving)

    def _end(self, trainer: Trainer, saving: Saving) -> None:
        problem = saving.finish()
        if problem is not None:
            self._tell_failure(saving, problem)
            return
        self.saved_step = saving.step
        self.failed_saves = 0
        for logger in trainer.loggers:
            logger.log_metrics({"checkpoint/seconds": saving.seconds, "checkpoint/gib": saving.num_bytes / GIB}, step=saving.step)
        if trainer.is_global_zero:
            self._delete_old(saving.run)
        trainer.strategy.barrier("old checkpoints deleted")  # here, where the others may wait for long

    def _tell_failure(self, saving: Saving, problem: str) -> None:
        self.failed_saves += 1
        told = f"checkpoint: {saving.final} ({size(saving.num_bytes)}) could not be written: {problem}."
        if self.failed_saves >= self.max_failed_saves:
            raise RecipeError(
                f"{told} The run ends here. Make room, or make the folder writable; the same command then continues from the "
                "newest complete checkpoint."
            )
        rank_zero_warn(
            f"{told} Training goes on WITHOUT this checkpoint, and ends if {self.max_failed_saves - self.failed_saves} more in a "
            "row cannot be written. Make room, or make the folder writable."
        )

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
        if trainer.is_global_zero and self.saved_step == trainer.global_step:
            best = {"monitor": self.monitor, "mode": self.mode, "score": score, "step": self.saved_step}
            file = run / CHECKPOINTS / BEST
            unfinished = file.with_name(file.name + UNFINISHED)
            try:
                with unfinished.open("w") as stream:
                    stream.write(json.dumps(best) + "\n")
                    synchronize(stream)
                os.replace(unfinished, file)
                synchronize_folder(file.parent)
            except OSError as error:
                warnings.warn(f"checkpoint: {file} could not be written: {error}.", stacklevel=2)
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
                try:
                    shutil.rmtree(old.rename(old.with_name(old.name + DELETED)))  # never half a checkpoint under a good name
                except OSError as error:
                    warnings.warn(f"checkpoint: {old} could not be deleted: {error}.", stacklevel=2)

    def _at_once(self, trainer: Trainer) -> int:
        """The most checkpoints that the run will have on the disk: before the oldest is deleted, the newest is written."""
        saves = self.keep + 1
        if self.every_n_minutes is None and trainer.max_steps > 0:
            saves = min(saves, -(-trainer.max_steps // (self.every_n_steps or trainer.max_steps)))
        return saves + (self.monitor is not None)

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


def _tidy(run: Path) -> None:
    """What a kill left half-done goes; damaged checkpoints keep their files, but not the name that the next one may need."""
    checkpoints = run / CHECKPOINTS
    for leftover in [*checkpoints.glob(f"step_*{UNFINISHED}"), *checkpoints.glob(f"{CANARY}*"), *checkpoints.glob(f"*{DELETED}")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in visible_checkpoints(run):
        if what_is_missing(folder) is not None:
            number = 0
            while (aside := folder.with_name(f"{folder.name}{DAMAGED}{number or ''}")).exists():
                number += 1
            with suppress(OSError):
                folder.rename(aside)
