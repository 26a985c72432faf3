"""Facts: what a recipe comes to, in one place, for the findings and the report of its plan."""

import math
from dataclasses import dataclass

from components.plan.choices import Choice
from components.plan.estimates import Estimate
from components.plan.machine import Machine
from components.plan.samples import Lengths, Share
from components.plan.workload import Workload
from components.sharding.layout import Layout

DAYS_BETWEEN_FAILURES = (4.0, 16.0)
"""At worst and at best, of 128 GPUs: OPT-175B's logbook and Llama 3's (arXiv 2205.01068, 2407.21783), by GPU."""
SAVING = 1e9
"""Rate at which a node writes a checkpoint, in bytes/s: an estimate."""


@dataclass(frozen=True)
class FirstStage:
    """What an earlier run was trained on, whose weights this one starts from.

    Args:
        name: As `model.initial_weights` names it.
        image_size: Side of its pictures, in pixels.
        tokens_per_image: Visual tokens of its pictures.
    """

    name: str
    image_size: int
    tokens_per_image: int


@dataclass(frozen=True)
class Saving:
    """The recipe's section `checkpoint`.

    Args:
        every_n_steps: Optimizer steps between checkpoints, or None.
        every_n_minutes: Minutes between checkpoints, or None.
        keep: Newest checkpoints that are kept.
        monitor: Score whose best checkpoint is kept besides, or None.
    """

    every_n_steps: int | None
    every_n_minutes: float | None
    keep: int
    monitor: str | None


@dataclass(frozen=True)
class Asking:
    """The recipe's section `validation`.

    Args:
        benchmarks: Names of the benchmarks.
        every_n_steps: Optimizer steps between validations, or None.
        at_start: Whether the first weights are asked.
        at_end: Whether the last weights are asked.
    """

    benchmarks: tuple[str, ...]
    every_n_steps: int | None
    at_start: bool
    at_end: bool


@dataclass(frozen=True)
class Running:
    """The recipe's section `trainer`, on the machine that is planned for.

    Args:
        on_gpus: Whether it runs on GPUs.
        nodes: Computers.
        devices: Processes of each.
        accumulation: Micro-batches of an optimizer step.
        precision: As the recipe spells it.
        strategy: Name of its class, or its word.
        planned: Whether the strategy is one whose memory and communication are known.
        full_state: Whether it gathers a checkpoint whole on one rank.
        layout: How the strategy lays the model over the ranks; None where it says nothing of that.
        limited: Keys of the trainer that end the run before max_steps, with their values.
    """

    on_gpus: bool
    nodes: int
    devices: int
    accumulation: int
    precision: str
    strategy: str
    planned: bool
    full_state: bool
    layout: Layout | None
    limited: dict[str, str]

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.nodes * self.devices


@dataclass(frozen=True)
class Facts:
    """A recipe, resolved.

    Args:
        run: Name of its run.
        workload: What it trains; of one text token where the lengths are not known.
        rates: Peak learning rate of each part, None where it is frozen.
        unlearned: Parts that start from random weights.
        seeded: Whether the recipe states its seed.
        warmup_steps: Optimizer steps of warmup.
        floor: Where the cosine ends, as a share of the peak.
        running: How it runs.
        saving: When it saves.
        asking: When it is asked.
        template: Its conversation template.
        max_length: Most tokens of a document.
        workers: Processes that prepare batches, of each rank.
        shares: Its sources.
        lengths: The mean sample, or None.
        measured: Samples that were prepared here.
        measured_text: Text tokens of their mean.
        truncated: How many of them lost their last turns.
        bad: Why others could not be prepared.
        first_stage: The run it starts from, where its recipe is at hand.
        machine: The GPUs, or None.
        estimate: What the recipe's schedule costs there, or None.
        choices: Schedules for the same step that are faster, the recommended one first.
    """

    run: str
    workload: Workload
    rates: dict[str, float | None]
    unlearned: tuple[str, ...]
    seeded: bool
    warmup_steps: int
    floor: float
    running: Running
    saving: Saving
    asking: Asking
    template: str
    max_length: int
    workers: int
    shares: tuple[Share, ...]
    lengths: Lengths | None
    measured: int = 0
    measured_text: float = 0.0
    truncated: int = 0
    bad: tuple[str, ...] = ()
    first_stage: FirstStage | None = None
    machine: Machine | None = None
    estimate: Estimate | None = None
    choices: tuple[Choice, ...] = ()

    @property
    def divides(self) -> bool:
        """Whether the global batch is a whole number of samples for every micro-batch."""
        return self.workload.global_batch_size % (self.running.ranks * self.running.accumulation) == 0

    @property
    def micro_batch(self) -> int:
        """Samples of a micro-batch; rounded where the global batch cannot be dealt."""
        return max(1, self.workload.global_batch_size // (self.running.ranks * self.running.accumulation))

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint: fp32 weights, and both moments of what trains."""
        parts = self.workload.parts.values()
        return sum(4 * part.parameters + 8 * part.trained_parameters for part in parts)

    @property
    def save_seconds(self) -> float:
        """Time of writing a checkpoint, all nodes at once."""
        return self.checkpoint_bytes / (SAVING * self.running.nodes)

    @property
    def save_interval(self) -> float | None:
        """Seconds between checkpoints; None where there is none before the end, or where a step's time is not known."""
        intervals = []
        if self.saving.every_n_minutes is not None:
            intervals.append(60 * self.saving.every_n_minutes)
        if self.saving.every_n_steps is not None and self.estimate is not None:
            intervals.append(self.saving.every_n_steps * self.estimate.serial_seconds)
        return min(intervals, default=None)

    @property
    def best_intervals(self) -> tuple[float, float]:
        """Seconds between checkpoints that lose the least time, with as many failures as at worst and as at best (Young 1974)."""
        worst, best = (math.sqrt(2 * self.save_seconds * days * 86400 * 128 / self.running.ranks) for days in DAYS_BETWEEN_FAILURES)
        return worst, best

    def instead(self, otherwise: str = "") -> str:
        """The remedy for a schedule: the overlay of the recommended one, or other advice where there is none."""
        return f"As an overlay:\n{self.choices[0].overlay}" if self.choices else otherwise
