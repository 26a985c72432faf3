"""Learning-rate schedule: linear warmup, then cosine, as a closed form of the optimizer step.

Source: `get_cosine_schedule_with_warmup` of transformers, the schedule of LLaVA-1.5 (scripts/v1_5). Differs: the cosine may end at
a floor above zero.
"""

import math

from lightning import Callback, LightningModule, Trainer

from components.errors import RecipeError


class Warmup(Callback):
    """Optimizer step in, learning rate of every parameter group out; nothing is stored, so a resumed run continues exactly.

    Args:
        steps: Optimizer steps of linear warmup, >= 0; give either `steps` or `fraction`.
        fraction: Warmup as a share of trainer.max_steps, in [0, 1], rounded up.
        floor: Where the cosine ends, as a share of the peak, in [0, 1].

    Raises:
        RecipeError: Both or neither of `steps` and `fraction`, a value out of range, or a warmup as long as the run.
    """

    def __init__(self, steps: int | None = None, fraction: float | None = None, floor: float = 0.0) -> None:
        if (steps is None) == (fraction is None):
            raise RecipeError(f"warmup: give either steps or fraction (steps = {steps}, fraction = {fraction}).")
        if (steps or 0) < 0 or not 0 <= (fraction or 0) <= 1 or not 0 <= floor <= 1:
            raise RecipeError(f"warmup: steps = {steps} must be >= 0, fraction = {fraction} and floor = {floor} in [0, 1].")
        self.steps = steps
        self.fraction = fraction
        self.floor = floor

    def num_steps(self, max_steps: int) -> int:
        """Warmup steps of a run of `max_steps`."""
        return self.steps if self.steps is not None else math.ceil((self.fraction or 0.0) * max_steps)

    def factor(self, step: int, max_steps: int) -> float:
        """Share of the peak learning rate at an optimizer step, counted from 0."""
        warmup = self.num_steps(max_steps)
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / max(1, max_steps - warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember every group's peak; refuse a warmup that never ends."""
        warmup = self.num_steps(trainer.max_steps)
        if warmup >= trainer.max_steps:
            raise RecipeError(
                f"warmup takes {warmup} steps, but the run has trainer.max_steps = {trainer.max_steps}: the peak would never be "
                "reached. Lower warmup.steps or give warmup.fraction."
            )
        for group in trainer.optimizers[0].param_groups:
            group["initial_lr"] = getattr(pl_module.learning_rates, group["name"].removesuffix("_no_decay"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Set the learning rate of the optimizer step that this micro-batch belongs to."""
        factor = self.factor(trainer.global_step, trainer.max_steps)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * factor
            if not group["name"].endswith("_no_decay"):
                pl_module.log(f"lr/{group['name']}", group["lr"])
