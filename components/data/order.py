"""The order of the data as pure functions: slot -> (source, epoch, sample), and a step's slots -> ranks and micro-batches.

Position in the data is one integer, the slot: optimizer step k with global batch G is exactly the slots [kG, (k+1)G), for any
number of ranks. What is shuffled is shuffled by keyed bijections in 64-bit integers (Black and Rogaway 2002, "Ciphers with
arbitrary finite domains"), so that no permutation of samples is held in memory and no library can change the order.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, UInt64

from components.errors import RecipeError

BLOCK = 1000
"""Slots in which the weights of a mixture hold exactly."""

_PATTERN, _SHARDS, _SAMPLE, SCENE, _MEMBERS = range(5)  # what randomness decides: no two purposes share any
_ROUNDS = 3  # of two halves each: measured, no deviation from uniform shows for more than 64 samples
_SORTED = 64  # samples up to which hashes are compared: a Feistel network of so few is not uniform
_PIECE = 8192  # slots worked on at once: bounds the memory of a look-up
_WORD = 2**64 - 1
# of one word each: with a single slot, numpy is faster by two thirds with arrays than with numbers
_GAMMA, _FIRST, _SECOND = np.array([[0x9E3779B97F4A7C15], [0xBF58476D1CE4E5B9], [0x94D049BB133111EB]], dtype=np.uint64)
_27, _30, _31, _32 = np.array([[27], [30], [31], [32]], dtype=np.uint64)
_HALF_ROUNDS = np.arange(2 * _ROUNDS, dtype=np.uint64)[:, None] * _GAMMA
_OTHERS = np.arange(_SORTED, dtype=np.uint64)


def stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """A random generator that depends on nothing but its arguments."""
    entropy = np.random.SeedSequence([seed, purpose, *position])
    return np.random.Generator(np.random.Philox(entropy))


def _mix(words: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """A bijection of 64-bit words whose results look random: SplitMix64 (Steele, Lea and Flood 2014)."""
    words = (words ^ (words >> _30)) * _FIRST
    words = (words ^ (words >> _27)) * _SECOND
    return words ^ (words >> _31)


def _key(*parts: int | np.ndarray) -> UInt64[np.ndarray, " n"]:
    """One key for each position of what is listed; numbers hold for all of them."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = part & _WORD if isinstance(part, int) else part.astype(np.uint64)
        key = _mix(key + _GAMMA + word)
    return key


def _shuffled(key: UInt64[np.ndarray, " 1"], size: int) -> Int64[np.ndarray, " size"]:
    """The numbers below a size in the order of their hashes, which never tie."""
    return np.argsort(_mix(key + np.arange(size, dtype=np.uint64) * _GAMMA))


def permute(
    keys: UInt64[np.ndarray, " n"], sizes: UInt64[np.ndarray, " n"], places: UInt64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """Where each place in [0, size) goes in the permutation of its key.

    Args:
        keys: Decide the permutations.
        sizes: How many are permuted, >= 1.
        places: In [0, size).
    """
    few = sizes <= _SORTED
    if few.all():
        return _by_rank(keys, sizes, places)
    if not few.any():
        return _feistel(keys, sizes, places)
    result = np.empty_like(places)
    for those, bijection in ((few, _by_rank), (~few, _feistel)):
        result[those] = bijection(keys[those], sizes[those], places[those])
    return result


def _by_rank(
    keys: UInt64[np.ndarray, " n"], sizes: UInt64[np.ndarray, " n"], places: UInt64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """The rank of a place's hash among all hashes of its permutation."""
    before = _mix(keys[:, None] + _OTHERS * _GAMMA) < _mix(keys + places * _GAMMA)[:, None]
    return (before & (sizes[:, None] > _OTHERS)).sum(1).astype(np.uint64)


def _feistel(
    keys: UInt64[np.ndarray, " n"], sizes: UInt64[np.ndarray, " n"], places: UInt64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """A place as (row, column) of a table barely larger than the size; each is moved in turn by a hash of the other."""
    rows = np.sqrt(sizes).astype(np.uint64) + 1
    columns = (sizes + rows - 1) // rows
    row, column = np.divmod(places, columns)
    for even, odd in zip(_HALF_ROUNDS[::2], _HALF_ROUNDS[1::2], strict=True):
        row = (row + (_mix(keys + even + column) >> _32)) % rows
        column = (column + (_mix(keys + odd + row) >> _32)) % columns
    moved = row * columns + column
    outside = moved >= sizes
    if outside.any():  # a cell of the table past the end: walk on until it is inside
        moved[outside] = _feistel(keys[outside], sizes[outside], moved[outside])
    return moved


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
        self._members = _key(self.seed, _MEMBERS, self.source)
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
        keys = _mix(_mix(self._members + epochs.view(np.uint64)) + windows.view(np.uint64))
        return permute(keys, sizes.view(np.uint64), places.view(np.uint64)).view(np.int64)

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of the shards in an epoch, where each ends, and where windows begin and end. 16 bytes a shard."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = _shuffled(_key(self.seed, _SHARDS, self.source, epoch), len(self.shards.sizes))
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
        self._quotas = np.stack([_quotas(segment.weights) for segment in self.segments])
        self._sources = [_SourceOrder(shards, self.seed, number) for number, shards in enumerate(self.shards)]
        for number, source in enumerate(self._sources):
            if not source.size and self._quotas[:, number].any():
                raise RecipeError(f"data.sources: source {number + 1} has no sample to train on. Add some, or set its weight to 0.")
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
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
        if first not in self._blocks:
            quotas = self._quotas[segment]
            pattern = np.repeat(np.arange(len(quotas)), quotas)[_shuffled(_key(self.seed, _PATTERN, first), BLOCK)]
            ranks = np.empty_like(pattern)
            ranks[np.argsort(pattern, kind="stable")] = np.arange(BLOCK) - np.repeat(np.cumsum(quotas) - quotas, quotas)
            while len(self._blocks) >= 16:  # as many as a step touches, and few
                del self._blocks[next(iter(self._blocks))]
            self._blocks[first] = (pattern, ranks)
        return self._blocks[first]


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
