"""Communication: the collectives of an optimizer step, counted exactly, and the time they take on a machine."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in an optimizer step, as one rank sees them.

    Args:
        calls: How many there are.
        bytes: Sum over the calls of the unsharded side: the output of an all-gather, the input of a reduce-scatter.
    """

    calls: int
    bytes: int


@dataclass(frozen=True)
class Communication:
    """The collectives of an optimizer step.

    Args:
        collectives: Calls and bytes of each kind.
        seconds: Time of all of them, one after another, when nothing else is in their way.
    """

    collectives: dict[Kind, Collective]
    seconds: float
