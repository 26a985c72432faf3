"""Steps whose loss or gradient norm is far above what it was: written down with their samples, nothing else.

Source: running mean and deviation with exponential weights, as in Lightning's SpikeDetection. Differs: the run goes on, and the
samples of all ranks are named.
"""

from pathlib import Path
from typing import Any

from lightning import Trainer

from callbacks.guards.records import Samples, append, of_all_ranks
from components.optimizer_step import OptimizerStep

FILE = "spikes.jsonl"
_WEIGHT = 0.02  # of the newest step: the mean looks back about 50 steps
_STEPS_BEFORE_FIRST = 50
_LEAST_DEVIATION = 1e-3  # of the mean: rounding is no spike


class Running:
    """Numbers in, their running mean and deviation out."""

    def __init__(self) -> None:
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def take(self, value: float) -> float:
        """How many deviations a number is above the mean of those before; it counts from now on."""
        deviation = max(self.variance**0.5, _LEAST_DEVIATION * abs(self.mean))
        above = (value - self.mean) / deviation if self.count >= _STEPS_BEFORE_FIRST and deviation else 0.0
        self.count += 1
        weight = max(_WEIGHT, 1 / self.count)
        difference = value - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)
        return above


class Spikes:
    """Optimizer steps in; a line in `spikes.jsonl` for each whose loss or norm jumps out.

    Args:
        deviations: How far above its running mean a number must be, in standard deviations; None: nothing is written.
    """

    def __init__(self, deviations: float | None) -> None:
        self.deviations = deviations
        self.loss, self.norm = Running(), Running()
        self.last: dict[str, Any] = {}

    def take(self, trainer: Trainer, step: OptimizerStep, samples: Samples, run: Path) -> None:
        """Look at the step that has just ended; write down the one before if any rank wished so. Called on all ranks."""
        model: Any = trainer.lightning_module
        if step.report and self.last:
            ranks = of_all_ranks(trainer, samples.before)
            if trainer.is_global_zero:
                append(run / FILE, {**self.last, "ranks": ranks})
        self.last, model.wishes.report = {}, False
        if step.skipped or self.deviations is None:
            return
        self.last = {
            "step": trainer.global_step,
            "loss": step.mean_loss,
            "expected_loss": self.loss.mean,
            "norm": step.norm,
            "expected_norm": self.norm.mean,
        }
        # a wish, not a decision: ranks of different replicas may differ in the last bit of the norm
        model.wishes.report = max(self.loss.take(step.mean_loss), self.norm.take(step.norm)) > self.deviations

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"loss": dict(vars(self.loss)), "norm": dict(vars(self.norm))}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        vars(self.loss).update(state["loss"])
        vars(self.norm).update(state["norm"])
