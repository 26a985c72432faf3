"""Schedule: how an optimizer step is cut into micro-batches over ranks."""

from dataclasses import dataclass

from components.sharding.layout import Layout


@dataclass(frozen=True)
class Schedule:
    """How an optimizer step is computed.

    Args:
        layout: How the model lies over the ranks.
        micro_batch: Samples that a rank computes at a time, >= 1.
        accumulation: Micro-batches of an optimizer step, >= 1.
    """

    layout: Layout
    micro_batch: int
    accumulation: int

    @property
    def global_batch_size(self) -> int:
        """Samples of an optimizer step."""
        return self.layout.ranks * self.micro_batch * self.accumulation

    @property
    def reductions(self) -> int:
        """How often in an optimizer step gradients are reduced among the shards."""
        return 1 if self.layout.defer_reduce_scatter else self.accumulation
