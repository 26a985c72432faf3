"""Memory: what lies on one GPU at the peak of a step, by component."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Memory:
    """GiB on one GPU at the peak of a step.

    Args:
        parameters: Shards of the trained parameters, fp32.
        gradients: Their gradients, fp32.
        optimizer: Both moments of Adam, fp32.
        frozen: Frozen parameters: fp32 shards, or whole in the number format of the computation.
        gathered: Whole blocks in flight and the root's parameters, in the number format of the computation.
        reduction: Gradients of a block that are being reduced, in the number format of the reduction.
        activations: What backward needs of forward.
        logits: Logits, their probabilities and gradients, on the supervised positions.
        allowance: CUDA context, communication buffers and fragmentation: an estimate.
        usable: What the GPU has.
    """

    parameters: float
    gradients: float
    optimizer: float
    frozen: float
    gathered: float
    reduction: float
    activations: float
    logits: float
    allowance: float
    usable: float

    @property
    def total(self) -> float:
        """Sum of the components."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "usable")

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much."""
        return self.total <= self.usable
