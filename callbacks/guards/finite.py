"""Steps whose loss or gradient is not finite: the model skips them on all ranks; here they are counted, until they are too many."""

from pathlib import Path
from typing import Any

from lightning import Trainer
from tqdm import tqdm

from callbacks.guards.records import Samples, append, number, of_all_ranks
from components.errors import RecipeError
from components.optimizer_step import OptimizerStep

FILE = "skipped_steps.jsonl"


class SkippedSteps:
    """Optimizer steps in; a line in `skipped_steps.jsonl` for each that was not finite out.

    Args:
        most: Skipped steps in a row that end the run.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0
        self.in_a_row = 0

    def take(self, trainer: Trainer, step: OptimizerStep, samples: Samples, run: Path) -> None:
        """Count the step that has just ended. Called on all ranks.

        Raises:
            RecipeError: On all ranks: it was one too many.
        """
        if step.finite:
            self.in_a_row = 0
            return
        self.count += 1
        self.in_a_row += 1
        ranks: list[Any] = of_all_ranks(trainer, samples.now)
        if trainer.is_global_zero:
            append(
                run / FILE,
                {"step": trainer.global_step, "loss": number(step.mean_loss), "norm": number(step.norm), "ranks": ranks},
            )
            tqdm.write(f"step {trainer.global_step} is skipped: loss {step.mean_loss}, norm {step.norm}. Its samples: {run / FILE}")
        if self.in_a_row >= self.most:
            raise RecipeError(
                f"The last {self.in_a_row} optimizer steps had a loss or gradient that is not finite, and were skipped; "
                f"guards.max_skipped_steps = {self.most}. The weights are those before these steps. {run / FILE} names their "
                "samples and the loss of each micro-batch. Lower model.learning_rates or set trainer.gradient_clip_val in a run of "
                "its own (--run NAME), or take the samples out; the same command goes on after the last checkpoint."
            )
