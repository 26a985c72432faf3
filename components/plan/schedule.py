"""Schedule: how an optimizer step is cut into micro-batches over ranks; what it costs, and which others do the same work."""

from dataclasses import dataclass
from typing import Literal

from components.plan.communication import Communication
from components.plan.memory import Memory
from components.sharding.layout import Layout


@dataclass(frozen=True)
class Schedule:
    """How an optimizer step is computed.

    Args:
        layout: How the model lies over the ranks.
        micro_batch: Samples that a rank computes at a time.
        accumulation: Micro-batches of an optimizer step.
    """

    layout: Layout
    micro_batch: int
    accumulation: int

    @property
    def global_batch_size(self) -> int:
        """Samples of an optimizer step."""
        return self.layout.ranks * self.micro_batch * self.accumulation


@dataclass(frozen=True)
class Estimate:
    """What a schedule costs on a machine.

    Args:
        schedule: The schedule.
        memory: On one GPU.
        communication: Of an optimizer step.
        compute_seconds: Computing of an optimizer step, with what checkpointing recomputes.
        overlapped_seconds: An optimizer step when communication hides behind computing as far as it can.
        serial_seconds: An optimizer step when nothing overlaps.
        overlapped_mfu: MFU of the first, in [0, 1]; recomputation does not count as work.
        serial_mfu: MFU of the second.
        tokens_per_second: Of all GPUs, with perfect overlap.
        days: Of all steps, with perfect overlap.
        gpu_hours: Of all steps and GPUs, with perfect overlap.
        bound: What limits the step.
    """

    schedule: Schedule
    memory: Memory
    communication: Communication
    compute_seconds: float
    overlapped_seconds: float
    serial_seconds: float
    overlapped_mfu: float
    serial_mfu: float
    tokens_per_second: float
    days: float
    gpu_hours: float
    bound: Literal["compute", "communication", "memory"]
