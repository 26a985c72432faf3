"""The order of the data as pure functions: slot -> (source, epoch, sample), and a step's slots -> ranks and micro-batches.

Position in the data is one integer, the slot: optimizer step k with global batch G is exactly the slots [kG, (k+1)G), for any
number of ranks.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from components.data.permutation import key_of, mix, permute, shuffled
from components.errors import RecipeError

BLOCK = 1000
"""Slots in which the weights of a mixture hold exactly."""

_PATTERN, _SHARDS, _SAMPLE, SCENE, _MEMBERS = range(5)  # what randomness decides: no two purposes share any
_PIECE = 8192  # slots worked on at once: bounds the memory of a look-up


def stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """A random generator that depends on nothing but its arguments."""
    entropy = np.random.SeedSequence([seed, purpose, *position])
    return np.random.Generator(np.random.Philox(entropy))


def _groups(values: Int64[np.ndarray, " n"]) -> Iterator[tuple[int, np.ndarray | slice]]:
    """Each distinct value with the positions where it stands."""
    if not len(values):
        return
    if (values == values[0]).all():
        yield int(values[0]), slice(None)
        return
    order = np.argsort(values, kind="stable")
    for here in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
        yield int(values[here[0]]), here


@dataclass(frozen=True)
class Shards:
    """What the order knows of a source.

    Args:
        sizes: Training samples of each shard, >= 0; a source without shards is one shard.
        window: Shards whose samples are shuffled together, >= 1.
    """

    sizes: Int64[np.ndarray, " shards"]
    window: int


@dataclass(frozen=True)
class Segment:
    """Weights that hold from a slot on.

    Args:
        first_slot: Where they begin, >= 0.
        weights: Relative weight of each source, >= 0; one of weight 0 is not drawn.
    """

    first_slot: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Draws:
    """What stands at slots.

    Args:
        source: Which source.
        epoch: Which pass over it.
        number: Which of its training samples, counted shard by shard.
    """

    source: Int64[np.ndarray, " slots"]
    epoch: Int64[np.ndarray, " slots"]
    number: Int64[np.ndarray, " slots"]


@dataclass
class _SourceOrder:
    """Draws of one source, counted from the run's first, in; epochs and samples out.

    Shards are shuffled in every epoch, and the samples of `window` successive shards among themselves.
    """

    shards: Shards
    seed: int
    source: int

    def __post_init__(self) -> None:
        self.size = int(self.shards.sizes.sum())
        self._starts = np.cumsum(self.shards.sizes) - self.shards.sizes
        self._members = key_of(self.seed, _MEMBERS, self.source)
        self._epoch: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def epochs_and_numbers(self, draws: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Which pass, and which sample of it."""
        epochs, places = np.divmod(draws, self.size)
        if len(self.shards.sizes) <= self.shards.window:  # one window holds all: the order of shards decides nothing
            return epochs, self._permute(epochs, np.zeros_like(epochs), np.full_like(epochs, self.size), places)
        numbers = np.empty_like(draws)
        for epoch, here in _groups(epochs):
            numbers[here] = self._numbers(epoch, places[here])
        return epochs, numbers

    def _numbers(self, epoch: int, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        order, ends, windows = self._shuffled_shards(epoch)
        window = windows[1:].searchsorted(places, side="right")
        first = windows[window]
        place = first + self._permute(np.full_like(places, epoch), window, windows[window + 1] - first, places - first)
        at = ends.searchsorted(place, side="right")
        shard = order[at]
        return self._starts[shard] + place - ends[at] + self.shards.sizes[shard]

    def _permute(
        self,
        epochs: Int64[np.ndarray, " n"],
        windows: Int64[np.ndarray, " n"],
        sizes: Int64[np.ndarray, " n"],
        places: Int64[np.ndarray, " n"],
    ) -> Int64[np.ndarray, " n"]:
        keys = mix(self._members + epochs.view(np.uint64)) + windows.view(np.uint64)
        return permute(keys, sizes.view(np.uint64), places.view(np.uint64)).view(np.int64)

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of the shards in an epoch, where each ends, and where windows begin and end. 16 bytes a shard."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = shuffled(key_of(self.seed, _SHARDS, self.source, epoch), len(self.shards.sizes))
            ends = np.cumsum(self.shards.sizes[order])
            windows = np.concatenate([[0], ends[self.shards.window - 1 : -1 : self.shards.window], ends[-1:]])
            self._epoch = (epoch, order, ends, windows)
        return self._epoch[1:]


def _quotas(weights: tuple[float, ...]) -> Int64[np.ndarray, " sources"]:
    """Draws of each source in a block: the weights' shares by largest remainder.

    Raises:
        RecipeError: No weight, a negative one, or one too small to be drawn within a block.
    """
    total = sum(weights)
    if min(weights) < 0 or not 0 < total < math.inf:
        raise RecipeError(f"data.sources: weights {', '.join(map(str, weights))}. State weights >= 0, and one of them > 0.")
    shares = np.array(weights) / total * BLOCK
    quotas = np.floor(shares).astype(np.int64)
    quotas[np.argsort(quotas - shares, kind="stable")[: BLOCK - quotas.sum()]] += 1
    never = [weight for weight, quota in zip(weights, quotas, strict=True) if weight > 0 and not quota]
    if never:
        least = (total - sum(never)) / (BLOCK - len(never))
        raise RecipeError(
            f"data.sources: weight {min(never)} of {total} is less than one sample in {BLOCK} and would never be drawn. "
            f"Raise it to {math.ceil(least * 1e3) / 1e3:g} or more, or set it to 0."
        )
    return quotas


@dataclass
class Mixture:
    """Weighted sources in, the draws at any slots out, in constant time and memory.

    Weights hold exactly in every block of 1000 slots, counted from the segment's first slot. A source goes on from segment to
    segment where it was.

    Args:
        shards: The sources.
        segments: Weights over the run; the first segment begins at slot 0.
        seed: Decides the whole order.

    Raises:
        RecipeError: A weight is too small to be drawn within a block, or a source that is to be drawn has no samples.
    """

    shards: list[Shards]
    segments: list[Segment]
    seed: int
    _quotas: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._firsts = np.array([segment.first_slot for segment in self.segments], dtype=np.int64)
        if self._firsts[0] or (np.diff(self._firsts) <= 0).any():
            raise ValueError(f"Segments of a mixture begin at slot 0 and ascend; these begin at {self._firsts.tolist()}.")
        if any(len(segment.weights) != len(self.shards) for segment in self.segments):
            raise ValueError(f"A mixture of {len(self.shards)} sources needs as many weights in each segment.")
        self._quotas = np.stack([_quotas(segment.weights) for segment in self.segments])
        self._sources = [_SourceOrder(shards, self.seed, number) for number, shards in enumerate(self.shards)]
        for number, source in enumerate(self._sources):
            if not source.size and self._quotas[:, number].any():
                raise RecipeError(f"data.sources: source {number + 1} has no sample to train on. Add some, or set its weight to 0.")
        self._blocks: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._before = np.zeros_like(self._quotas)  # draws of each source before each segment
        for segment in range(1, len(self.segments)):
            self._before[segment] = self._drawn(segment - 1, int(self._firsts[segment]))

    def quotas_at(self, slot: int) -> Int64[np.ndarray, " sources"]:
        """Draws of each source in a block of the segment at a slot."""
        return self._quotas[np.searchsorted(self._firsts, slot, side="right") - 1]

    def drawn(self, slot: int) -> Int64[np.ndarray, " sources"]:
        """How many draws each source has had before a slot."""
        return self._drawn(int(np.searchsorted(self._firsts, slot, side="right")) - 1, slot)

    def _drawn(self, segment: int, slot: int) -> Int64[np.ndarray, " sources"]:
        blocks, rest = divmod(slot - int(self._firsts[segment]), BLOCK)
        pattern, _ = self._block(segment, slot - rest)
        partial = np.bincount(pattern[:rest], minlength=len(self.shards))
        return self._before[segment] + blocks * self._quotas[segment] + partial

    def draws(self, slots: Int64[np.ndarray, " slots"]) -> Draws:
        """The draws at slots, in any order."""
        if len(slots) <= _PIECE:
            return Draws(*self._draws(slots))
        pieces = [self._draws(slots[first : first + _PIECE]) for first in range(0, len(slots), _PIECE)]
        return Draws(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))

    def sample_stream(self, slot: int) -> np.random.Generator:
        """The randomness inside the sample at a slot."""
        return stream(self.seed, _SAMPLE, slot)

    def _draws(self, slots: Int64[np.ndarray, " slots"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        segments = self._firsts.searchsorted(slots, side="right") - 1
        blocks, places = np.divmod(slots - self._firsts[segments], BLOCK)
        sources, ranks, epochs, numbers = np.empty((4, len(slots)), dtype=np.int64)
        for first, here in _groups(slots - places):
            pattern, rank = self._block(int(segments[here][0]), first)
            sources[here], ranks[here] = pattern[places[here]], rank[places[here]]
        draws = self._before[segments, sources] + blocks * self._quotas[segments, sources] + ranks
        for source, here in _groups(sources):
            epochs[here], numbers[here] = self._sources[source].epochs_and_numbers(draws[here])
        return sources, epochs, numbers

    def _block(self, segment: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources in the block that begins at a slot, and how many times each occurred before within it."""
        block = (segment, first)  # a slot may begin a block of two segments: where one breaks off, and where the next begins
        if block not in self._blocks:
            quotas = self._quotas[segment]
            pattern = np.repeat(np.arange(len(quotas)), quotas)[shuffled(key_of(self.seed, _PATTERN, first), BLOCK)]
            ranks = np.empty_like(pattern)
            ranks[np.argsort(pattern, kind="stable")] = np.arange(BLOCK) - np.repeat(np.cumsum(quotas) - quotas, quotas)
            while len(self._blocks) >= 16:  # as many as a step touches, and few
                del self._blocks[next(iter(self._blocks))]
            self._blocks[block] = (pattern, ranks)
        return self._blocks[block]


def deal(lengths: list[int], ranks: int, micro_batches: int) -> list[list[list[int]]]:
    """Samples of one optimizer step dealt to micro-batches and ranks, longest first, so that all carry about the same tokens.

    Args:
        lengths: Length of each sample, in tokens; at least ranks x micro_batches samples.
        ranks: Ranks that meet in every micro-batch.
        micro_batches: Micro-batches that an optimizer step accumulates.

    Returns:
        `[micro_batch][rank]` -> numbers of the samples, in ascending order; none is empty.
    """
    hands: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(ranks * micro_batches)]
    for sample in sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample)):
        load, number, samples = hands[0]
        samples.append(sample)
        heapq.heapreplace(hands, (load + max(lengths[sample], 1), number, samples))
    # ranks wait for one another in every micro-batch: hands of similar load share one
    hands.sort(reverse=True)
    dealt = []
    carried = [0] * ranks
    for first in range(0, len(hands), ranks):
        micro_batch: list[list[int]] = [[]] * ranks
        # nodes of a hybrid mesh wait for one another once in a step: who carries least so far takes the longest hand
        for rank, hand in zip(sorted(range(ranks), key=carried.__getitem__), hands[first : first + ranks], strict=True):
            carried[rank] += hand[0]
            micro_batch[rank] = sorted(hand[2])
        dealt.append(micro_batch)
    return dealt
