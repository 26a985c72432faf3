"""The one callback of all guards: it sees every step and phase of a run, and asks each guard in turn."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from callbacks.guards import preemption
from callbacks.guards.crash_loop import Starts
from callbacks.guards.finite import SkippedSteps
from callbacks.guards.hang_minutes import HangMinutes
from callbacks.guards.records import Samples
from callbacks.guards.spikes import Spikes
from callbacks.guards.stragglers import Stragglers
from callbacks.guards.watchdog import Watchdog
from components import phases
from components.batch import Batch
from components.errors import RecipeError
from components.optimizer_step import OptimizerStep
from components.sharding.timeouts import longest_timeout, set_collective_timeout

_HANG_MINUTES = HangMinutes()


class Guards(Callback):
    """A run in; its orderly end out, or one that says why, when it is told to end, diverges, hangs or goes in circles.

    SIGTERM and SIGUSR1, on any rank, end the run after the optimizer step: it is saved, and the exit code is 143. A process that
    hangs ends with 75. Both ask the launcher for another start; 2 does not. What happened stands in the run folder, in
    `skipped_steps.jsonl`, `spikes.jsonl`, `stragglers.jsonl`, `starts.jsonl` and `hang_rank_N.txt`.

    Args:
        max_skipped_steps: Optimizer steps in a row whose loss or gradient is not finite that end the run, >= 1. They change no
            weights; `train/skipped_steps` counts them.
        spike_deviations: Standard deviations above its running mean at which a loss or gradient norm is written down, > 0, or null.
        hang_minutes: Minutes that each phase of the run may go without progress; null for a phase: any time.
        step_timeout_minutes: How long a collective may take inside an optimizer step, > 0; elsewhere the strategy says it.
        straggler_every_n_steps: Optimizer steps between two looks at who holds up the others, >= 1.
        straggler_ratio: Step time of the slowest rank over that of the median rank above which it is named, > 1.
        max_fruitless_starts: Starts at the same step that end neither well nor after a checkpoint before the next is refused, >= 1,
            or null.

    Raises:
        RecipeError: A value out of range, too many steps that are not finite, or too many starts in vain.
    """

    def __init__(
        self,
        max_skipped_steps: int = 10,
        spike_deviations: float | None = 6.0,
        hang_minutes: HangMinutes = _HANG_MINUTES,
        step_timeout_minutes: float = 10.0,
        straggler_every_n_steps: int = 50,
        straggler_ratio: float = 1.5,
        max_fruitless_starts: int | None = 3,
    ) -> None:
        counts = {
            "max_skipped_steps": max_skipped_steps,
            "straggler_every_n_steps": straggler_every_n_steps,
            "max_fruitless_starts": max_fruitless_starts,
        }
        if wrong := {name: count for name, count in counts.items() if count is not None and count < 1}:
            raise RecipeError(f"guards: {wrong} must be at least 1.")
        if (spike_deviations is not None and spike_deviations <= 0) or step_timeout_minutes <= 0 or straggler_ratio <= 1:
            raise RecipeError(
                f"guards: spike_deviations = {spike_deviations} and step_timeout_minutes = {step_timeout_minutes} must be above 0, "
                f"straggler_ratio = {straggler_ratio} above 1."
            )
        self.hang_minutes = hang_minutes
        self.step_timeout_minutes = step_timeout_minutes
        self.max_fruitless_starts = max_fruitless_starts
        self.skipped_steps = SkippedSteps(max_skipped_steps)
        self.spikes = Spikes(spike_deviations)
        self.stragglers = Stragglers(straggler_every_n_steps, straggler_ratio)
        self.samples = Samples()
        self.recipe = ""
        """What is run, resolved; the command line knows it."""
        self.watchdog: Watchdog | None = None
        self.starts: Starts | None = None
        self.began = time.monotonic()
        self.productive = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a run that continues goes on counting from."""
        return {"skipped": self.skipped_steps.count, "in_a_row": self.skipped_steps.in_a_row, "spikes": self.spikes.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped_steps.count, self.skipped_steps.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self.spikes.load(state_dict["spikes"])

    # --- start and end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a start in vain; from now on this process is watched."""
        if stage != "fit":
            return
        run = Path(trainer.log_dir or ".")  # log_dir talks to all ranks
        starts = Starts(run, self.recipe, trainer.is_global_zero, trainer.world_size == 1)
        if self.max_fruitless_starts is not None:
            problem = starts.problem(self.max_fruitless_starts) if trainer.is_global_zero else None
            if problem := trainer.strategy.broadcast(problem):
                raise RecipeError(problem)
        starts.begin()
        self.run, self.starts = run, starts
        self.longest = longest_timeout(trainer.strategy)
        phases.listen(self._begin)
        phases.enter("start")
        self.watchdog = Watchdog(self.hang_minutes, run, trainer.global_rank, self.samples, starts.hang)
        self.watchdog.start()
        preemption.end_at_once()

    def _begin(self, phase: phases.Phase) -> None:
        """A phase begins. Inside a step no rank waits long for another; elsewhere one may have more to do."""
        short = timedelta(minutes=self.step_timeout_minutes)
        set_collective_timeout(min(short, self.longest) if phase == "step" else self.longest)
        self.mark = self.waiting_since = time.monotonic()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning has set its handlers: replace those that would talk to other ranks in the middle of anything."""
        preemption.listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run is about to train."""
        preemption.listen()
        # Lightning would ask for signals before every micro-batch, and wait for the device each time
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.stragglers.meet(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is done."""
        phases.enter("end")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run has finished."""
        self._close(trainer, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run ends otherwise."""
        self._close(trainer, exception)

    def _close(self, trainer: Trainer, exception: BaseException | None) -> None:
        if self.watchdog is None:
            return
        self.watchdog.stop()
        self.watchdog = None
        phases.listen(None)
        preemption.restore(trainer)
        assert self.starts is not None
        self.starts.end(exception)

    # --- steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """The data are there."""
        self.stragglers.data_wait += time.monotonic() - self.waiting_since
        self.samples.under_way = batch.sample_ids

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Right before the ranks add up their losses and wishes."""
        pl_module.wishes.stop = preemption.is_told()  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Between two optimizer steps, ask every guard; the last word has who was told to end."""
        self.samples.take(batch, outputs["loss"])
        phases.get_on()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._end_step(trainer, pl_module)
        self.waiting_since = time.monotonic()

    def _end_step(self, trainer: Trainer, model: Any) -> None:
        if phases.current()[0] == "start":  # of which the time says nothing of other steps
            phases.enter("step")
            self.stragglers.data_wait = 0.0
        else:
            self._count_time()
        step: OptimizerStep = model.step
        self.skipped_steps.take(trainer, step, self.samples, self.run)
        self.spikes.take(trainer, step, self.samples, self.run)
        self.samples.turn()
        figures = self.stragglers.look(trainer, model.device, self.run)
        if figures:
            figures["time/productive_share"] = self.productive / (time.monotonic() - self.began)
        if self.skipped_steps.count:
            figures["train/skipped_steps"] = float(self.skipped_steps.count)
        for name, value in figures.items():
            model.log(name, value)
        # one process needs to ask nobody, not even about a signal that has come since
        if step.stop or (trainer.world_size == 1 and preemption.is_told()):
            preemption.save_and_end(trainer)

    def _count_time(self) -> None:
        seconds = time.monotonic() - self.mark
        self.mark += seconds
        self.productive += seconds
        self.stragglers.steps.append(seconds)
        if self.watchdog is not None:
            self.watchdog.step_seconds.append(seconds)

    # --- validation losses, which Lightning adds up between two steps

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning begins."""
        self.outer = phases.current()[0]
        phases.enter("validation")

    def on_validation_batch_end(self, *arguments: Any) -> None:
        """Lightning gets on."""
        phases.get_on()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning is done."""
        phases.enter(self.outer)
