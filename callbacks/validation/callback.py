"""When benchmarks are asked while a model trains and afterwards, and where their answers go."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from callbacks.checkpoint import Checkpoint
from callbacks.validation.asking import ask, exchange_pictures, gather, raise_together
from callbacks.validation.sheet import answer_sheet
from components.benchmarks import Benchmark
from components.benchmarks.report import PARTIAL, Report
from components.errors import RecipeError
from components.phases import phase
from components.recipe_files import hint
from components.run_folder import RECIPE


class Validation(Callback):
    """Benchmarks in, scores in the log, tables on the console and answers in the run folder's `validation/` out.

    Args:
        benchmarks: Name of each benchmark and the benchmark; the name stands in `NAME/accuracy` and in file names.
        every_n_steps: Optimizer steps between validations while training, >= 1, or null.
        at_start: Whether to validate before the first step of a run.
        at_end: Whether to validate when training reaches trainer.max_steps.
        limit: Most questions of each benchmark, >= 1, or null for all; names then end in `_partial`. The test command always asks
            all.
        batch_size: Prompts that each rank answers together, >= 1. Each token of theirs takes 0.8 MB for a 13B decoder in bf16.
        max_new_tokens: Longest answer, in tokens, >= 1; LLaVA-1.5 is evaluated with 128.
        shuffled_pictures: Whether to ask once more with the pictures exchanged, at the end of training (without `at_end`, at every
            validation on the way) and in the commands validate and test: a model that looks at them falls to the text-only best or
            below.
        num_pictures: Pictures shown with question and answers in TensorBoard, >= 0.

    Raises:
        RecipeError: A value out of range, or a benchmark that cannot be opened.
    """

    def __init__(
        self,
        benchmarks: dict[str, Benchmark],
        every_n_steps: int | None = None,
        at_start: bool = False,
        at_end: bool = True,
        limit: int | None = None,
        batch_size: int = 64,
        max_new_tokens: int = 16,
        shuffled_pictures: bool = False,
        num_pictures: int = 16,
    ) -> None:
        numbers = {"every_n_steps": every_n_steps, "limit": limit, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
        if wrong := {name: number for name, number in numbers.items() if number is not None and number < 1}:
            raise RecipeError(f"validation: {wrong} must be at least 1.")
        if wrong_names := [name for name in benchmarks if not re.fullmatch(r"[\w.+-]+", name)]:
            raise RecipeError(f"validation.benchmarks: {wrong_names[0]!r} must be a file name of letters, digits and ._+-.")
        if num_pictures < 0:
            raise RecipeError(f"validation: num_pictures = {num_pictures} must be at least 0.")
        self.benchmarks = benchmarks
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self.limit = limit
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.shuffled_pictures = shuffled_pictures
        self.num_pictures = num_pictures
        self.loaded_step = 0

    # --- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the benchmarks: what is missing shows before anything is trained."""
        if stage == "predict":
            return
        for name, benchmark in self.benchmarks.items():
            problem: RecipeError | None = None
            try:
                benchmark.setup(pictures=trainer.is_global_zero)  # one rank looks for thousands of files
                asked = benchmark.draw(None if stage == "test" else self.limit)
                if self.shuffled_pictures:
                    exchange_pictures(asked)
            except RecipeError as error:
                problem = RecipeError(f"validation.benchmarks.{name}: {error}")
            raise_together(trainer, problem)
        if stage == "fit":
            for checkpoint in _checkpoints(trainer):
                self._demand_monitored(checkpoint)

    def _demand_monitored(self, checkpoint: Checkpoint) -> None:
        """The score that decides about the best checkpoint will be there."""
        if checkpoint.monitor is None:
            return
        if not self.at_end and self.every_n_steps is None:
            raise RecipeError(
                f"checkpoint.monitor = {checkpoint.monitor} has no effect: validation is due neither on the way nor at_end."
            )
        scores: list[str] = []
        for name, benchmark in self.benchmarks.items():
            asked = benchmark.draw(self.limit)
            silent = Report(
                name, "before training", benchmark, asked, {question.id: "" for question in asked}, len(benchmark.questions())
            )
            scores += silent.logged()
        if checkpoint.monitor not in scores:
            told = f"checkpoint.monitor = {checkpoint.monitor} is no score of this validation.{hint(checkpoint.monitor, scores)}"
            raise RecipeError(f"{told} Its scores are: {', '.join(scores) or 'none'}.")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the step of the weights: validate and test do not restore the trainer's."""
        self.loaded_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate what the run starts from, or make up for a validation that was interrupted after its checkpoint."""
        step = trainer.global_step
        missing = trainer.strategy.broadcast(self._left_out(Path(trainer.log_dir or "."), step))  # log_dir talks to all ranks
        if (step == 0 and self.at_start) or (step and self._due(step) and missing):
            self.validate(trainer, pl_module, step, self.limit, self.shuffled_pictures and not self.at_end and step > 0)

    def _due(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def _left_out(self, run: Path, step: int) -> bool:
        """Whether the answers of a step to a benchmark have not been written."""
        names = (name + self._suffix(benchmark) for name, benchmark in self.benchmarks.items())
        return not all((run / "validation" / f"{name}_step_{step}.json").is_file() for name in names)

    def _suffix(self, benchmark: Benchmark) -> str:
        return PARTIAL if len(benchmark.draw(self.limit)) < len(benchmark.questions()) else ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Validate when it is due, and only between optimizer steps."""
        left_to_the_end = self.at_end and trainer.global_step >= trainer.max_steps
        if not (batch_idx + 1) % trainer.accumulate_grad_batches and self._due(trainer.global_step) and not left_to_the_end:
            for checkpoint in _checkpoints(trainer):  # Lightning calls them last: a validation that fails should lose nothing
                checkpoint.save_if_due(trainer)
            self.validate(trainer, pl_module, trainer.global_step, self.limit, self.shuffled_pictures and not self.at_end)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate a finished run. One that was interrupted has a checkpoint to write, and goes on later."""
        if self.at_end and trainer.global_step >= trainer.max_steps:
            self.validate(trainer, pl_module, trainer.global_step, self.limit, self.shuffled_pictures)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validate command."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.validate(trainer, pl_module, self.loaded_step, self.limit, self.shuffled_pictures)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The test command."""
        self.validate(trainer, pl_module, self.loaded_step, None, self.shuffled_pictures)

    # --- what

    @phase("validation")
    def validate(self, trainer: Trainer, pl_module: LightningModule, step: int, limit: int | None, shuffled_pictures: bool) -> None:
        """Ask the questions of every benchmark; score, show and keep the answers. Called on all ranks."""
        run = Path(trainer.log_dir or ".")  # log_dir talks to all ranks
        scores: dict[str, float] = {}
        for name, benchmark in self.benchmarks.items():
            asked = benchmark.draw(limit)
            options: dict[str, Any] = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
            answers = gather(trainer, ask(trainer, pl_module, benchmark, asked, title=name, **options))
            exchanged, others = None, None
            if shuffled_pictures:
                exchanged = exchange_pictures(asked)
                title = f"{name}, exchanged pictures"
                others = gather(trainer, ask(trainer, pl_module, benchmark, exchanged, title=title, **options))
            logged: dict[str, float] | Exception | None = None
            if trainer.is_global_zero:
                report = Report(name, f"at step {step}", benchmark, asked, answers, len(benchmark.questions()), exchanged, others)
                try:
                    logged = report.logged()
                    report.write(run / "validation", self._provenance(trainer, run, step))
                    self._show(trainer, report, step)
                except Exception as error:  # the other ranks wait for the scores: they must end as well
                    logged = error
            logged = trainer.strategy.broadcast(logged)
            if isinstance(logged, Exception):
                raise logged
            assert logged is not None
            scores |= logged
        trainer.callback_metrics.update({key: torch.tensor(value, dtype=torch.float64) for key, value in scores.items()})
        if trainer.state.fn == TrainerFn.FITTING and step:
            for checkpoint in _checkpoints(trainer):
                checkpoint.keep_best(trainer, scores)

    def _show(self, trainer: Trainer, report: Report, step: int) -> None:
        tqdm.write(report.table())
        some = np.sort(np.random.default_rng(0).permutation(len(report.asked))[: self.num_pictures])
        shown = [report.asked[number] for number in some if report.asked[number].images]
        for logger in trainer.loggers:
            logger.log_metrics(report.logged(), step=step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(f"{report.shown_name}/report", report.page(shown), step)
                if shown:
                    sheet = answer_sheet(report, shown)
                    logger.experiment.add_image(f"{report.shown_name}/answers", sheet, step, dataformats="HWC")

    def _provenance(self, trainer: Trainer, run: Path, step: int) -> dict[str, Any]:
        """What the answers depend on besides the questions."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        checkpoint = None if fitting or not trainer.ckpt_path else Path(trainer.ckpt_path).parent
        recipe = (checkpoint or run) / RECIPE
        preparation = trainer.datamodule.preparation  # type: ignore[attr-defined]
        return {
            "step": step,
            "checkpoint": str(checkpoint) if checkpoint else None,
            # there is no recipe outside of the command line
            "recipe_hash": hashlib.blake2b(recipe.read_bytes(), digest_size=16).hexdigest() if recipe.is_file() else None,
            "template": preparation.template,
            "image_decoding": preparation.decoding,
            "image_mode": preparation.image_mode,
            "decoding": {"method": "greedy", "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size},
            "ranks": trainer.world_size,
            "precision": str(trainer.precision),
        }


def _checkpoints(trainer: Trainer) -> list[Checkpoint]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Checkpoint)]  # type: ignore[attr-defined]
