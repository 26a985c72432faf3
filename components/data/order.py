"""The order of the data as pure functions: slot -> (source, epoch, sample), and a step's slots -> ranks and micro-batches.

Position in the data is one integer, the slot: optimizer step k with global batch G is exactly the slots [kG, (k+1)G), for any
number of ranks. All randomness is Philox, keyed by what it decides.
"""

import heapq
from dataclasses import dataclass, field

import numpy as np

from components.errors import RecipeError

BLOCK = 1000
"""Slots in which the weights of a mixture hold exactly."""

_PATTERN, _SHUFFLE, _SAMPLE, SCENE = range(4)  # what a random stream decides: no two purposes share a stream


def stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """A random generator that depends on nothing but its arguments."""
    entropy = np.random.SeedSequence([seed, purpose, *position])
    return np.random.Generator(np.random.Philox(entropy))


@dataclass(frozen=True)
class Draw:
    """What stands at a slot: which source, which pass over it, which of its samples."""

    source: int
    epoch: int
    index: int


@dataclass
class Mixture:
    """Weighted sources in, the draw at any slot out, in constant time.

    Args:
        weights: Relative weight of each source, > 0.
        sizes: Samples of each source, >= 1.
        seed: Decides the whole order.

    Raises:
        RecipeError: A weight is too small to be drawn within a block of 1000 slots.
    """

    weights: list[float]
    sizes: list[int]
    seed: int
    quotas: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shares = np.array(self.weights) / sum(self.weights) * BLOCK
        self.quotas = np.floor(shares).astype(int)
        for source in np.argsort(self.quotas - shares, kind="stable")[: BLOCK - self.quotas.sum()]:
            self.quotas[source] += 1
        if (self.quotas == 0).any():
            raise RecipeError(
                f"data.sources: weight {self.weights[int(self.quotas.argmin())]} of {sum(self.weights)} is less than one sample in "
                f"{BLOCK} and would never be drawn. Raise it."
            )
        self._pattern: tuple[int, np.ndarray, np.ndarray] | None = None
        self._shuffles: dict[int, tuple[int, np.ndarray]] = {}

    def draw(self, slot: int) -> Draw:
        """The draw at a slot."""
        block, offset = divmod(slot, BLOCK)
        if self._pattern is None or self._pattern[0] != block:
            pattern = stream(self.seed, _PATTERN, block).permutation(np.repeat(np.arange(len(self.quotas)), self.quotas))
            ranks = np.empty(BLOCK, dtype=np.int64)  # how many times the source occurred before, within the block
            for source, quota in enumerate(self.quotas):
                ranks[pattern == source] = np.arange(quota)
            self._pattern = (block, pattern, ranks)
        source = int(self._pattern[1][offset])
        number = block * int(self.quotas[source]) + int(self._pattern[2][offset])
        epoch, position = divmod(number, self.sizes[source])
        return Draw(source, epoch, int(self._shuffle(source, epoch)[position]))

    def sample_stream(self, slot: int) -> np.random.Generator:
        """The randomness inside the sample at a slot."""
        return stream(self.seed, _SAMPLE, slot)

    def _shuffle(self, source: int, epoch: int) -> np.ndarray:
        """The order of a source in an epoch, held whole: 8 bytes a sample, for each source and in each worker process.

        Meant for sources whose permutation fits into the memory of every process: up to some hundred million samples.
        """
        cached = self._shuffles.get(source)
        if cached is None or cached[0] != epoch:
            order = stream(self.seed, _SHUFFLE, source, epoch).permutation(self.sizes[source])
            cached = self._shuffles[source] = (epoch, order)
        return cached[1]


def deal(lengths: list[int], ranks: int, micro_batches: int) -> list[list[list[int]]]:
    """Samples of one optimizer step dealt to micro-batches and ranks, longest first, so that all carry about the same tokens.

    Args:
        lengths: Length of each sample, in tokens; at least ranks x micro_batches samples.
        ranks: Ranks that meet in every micro-batch.
        micro_batches: Micro-batches that an optimizer step accumulates.

    Returns:
        `[micro_batch][rank]` -> numbers of the samples, in ascending order; none is empty.
    """
    bins: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(ranks * micro_batches)]
    for sample in sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample)):
        load, number, samples = bins[0]
        samples.append(sample)
        heapq.heapreplace(bins, (load + max(lengths[sample], 1), number, samples))
    # ranks wait for one another in every micro-batch: bins of similar load share one
    by_load = [sorted(samples) for _, _, samples in sorted(bins, reverse=True)]
    return [by_load[first : first + ranks] for first in range(0, len(by_load), ranks)]
