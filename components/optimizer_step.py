"""One optimizer step as all ranks know it: its loss, its gradient norm, and what any of them wished."""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass
class Wishes:
    """What one rank wants all of them to do together; it travels with the loss of an optimizer step and costs no exchange.

    Args:
        stop: To save after the step, and to end.
        report: To write down the samples of the step before.
    """

    stop: bool = False
    report: bool = False

    def numbers(self) -> list[float]:
        """1 for a wish, else 0, to be added up over the ranks."""
        return [float(wish) for wish in astuple(self)]


@dataclass(frozen=True)
class OptimizerStep:
    """What every rank knows of a step before its update.

    Args:
        loss: Sum of the cross-entropy over the supervised tokens of all ranks.
        targets: Supervised tokens of all ranks.
        stop: Ranks that wish to save and to end.
        report: Ranks that wish the samples of the step before written down.
        norm: Norm of the gradient of the mean loss, before clipping.
    """

    loss: float
    targets: float
    stop: float
    report: float
    norm: float

    @property
    def mean_loss(self) -> float:
        """Loss of a supervised token; 0 where there is none."""
        return self.loss / max(1.0, self.targets)

    @property
    def finite(self) -> bool:
        """Whether an update would leave numbers in the weights."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    @property
    def skipped(self) -> bool:
        """Whether there is no update: nothing to learn from, or nothing that can be learned from."""
        return self.targets == 0 or not self.finite


def of_all_ranks(totals: Float[Tensor, " two"], wishes: Wishes, ranks: int) -> Float[Tensor, " four"]:
    """Loss, targets and wishes of this rank in, their sums over all ranks out, as `OptimizerStep` has them. Called on all ranks."""
    sums = torch.cat([totals, *(torch.full_like(totals[:1], wish) for wish in wishes.numbers())])
    if ranks > 1:
        torch.distributed.all_reduce(sums)  # not by the strategy, which would wait for the device before it
    return sums


def divide_gradients(parameters: Iterable[nn.Parameter], count: Float[Tensor, ""]) -> None:
    """Divide all gradients, whole or sharded, by one number."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:  # a rank may hold no shard of what trains
        torch._foreach_div_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], count)
