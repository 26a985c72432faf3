"""The order of 600 million samples: cold seek, look-up, memory, how sequential reads are, how well it shuffles.

The synthetic mixture stands for LAION, CC3M and SBU: 75,000 + 330 + 100 shards of 6,000-10,000 samples, weights 0.95 / 0.04 / 0.01.
"""

import argparse
import subprocess
import sys
import time

import numpy as np

from components.data.order import Mixture, Segment, Shards
from tests.benchmarks import private_megabytes, table

SHARDS = (75_000, 330, 100)
WEIGHTS = (0.95, 0.04, 0.01)
SLOT = 123_456_789
STEP = 2_048
RANKS = 128


def sizes_of(shards: int) -> np.ndarray:
    return np.random.default_rng(shards).integers(6_000, 10_001, shards)


def mixture(window: int = 64) -> Mixture:
    return Mixture([Shards(sizes_of(shards), window) for shards in SHARDS], [Segment(0, WEIGHTS)], seed=42)


def seek() -> None:
    """Prints the seconds from the sizes of the shards to the first draws, of one slot and then of a step."""
    sizes = [sizes_of(shards) for shards in SHARDS]
    began = time.perf_counter()
    mixed = Mixture([Shards(size, 64) for size in sizes], [Segment(0, WEIGHTS)], seed=42)
    mixed.draws(np.array([SLOT]))
    one = time.perf_counter()
    mixed.draws(np.arange(SLOT, SLOT + STEP))
    print(one - began, time.perf_counter() - one)


def cold_seeks(times: int) -> list[tuple[float, float]]:
    """Each in a process of its own, in milliseconds."""
    command = [sys.executable, "-c", "from tests.benchmarks.order import seek; seek()"]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(times)]
    return [(float(one) * 1e3, float(step) * 1e3) for one, step in printed]


def lookups(mixed: Mixture, count: int, stride: int, at_once: int, samples: int = 10) -> list[tuple[int, float, float]]:
    """(slots looked up so far, processor microseconds a slot since the last row, private MB), the first row before any."""
    rows = [(0, 0.0, private_megabytes())]
    calls = count // at_once
    slots = SLOT + np.arange(at_once) * stride
    for part in np.array_split(np.arange(calls), samples):
        began = time.process_time()
        for call in part.tolist():
            mixed.draws(slots + call * at_once * stride)
        seconds = time.process_time() - began
        rows.append(((int(part[-1]) + 1) * at_once, seconds / len(part) / at_once * 1e6, private_megabytes()))
    return rows


def nearness(window: int, shards: int = 1_024) -> list[object]:
    """How sequential the reads of one source are, and how well they are shuffled; all shards in one window: a full shuffle.

    Distances between reads are in samples, shards laid end to end in the order in which the epoch visits them.
    """
    sizes = sizes_of(shards)
    ends, total = np.cumsum(sizes), int(sizes.sum())
    numbers = Mixture([Shards(sizes, window)], [Segment(0, (1.0,))], seed=42).draws(np.arange(total)).number
    when = np.empty(total, dtype=np.int64)  # the place at which each sample is drawn
    when[numbers] = np.arange(total)
    first, last = np.minimum.reduceat(when, ends - sizes), np.maximum.reduceat(when, ends - sizes)
    visits = np.argsort(first)
    starts = np.empty(shards, dtype=np.int64)
    starts[visits] = np.cumsum(sizes[visits]) - sizes[visits]
    shard = np.searchsorted(ends, numbers, side="right")
    position = starts[shard] + numbers - (ends - sizes)[shard]
    places = np.arange(0, total, total // 200)
    is_open = (first <= places[:, None]) & (places[:, None] <= last)
    travel = np.delete(np.abs(np.diff(when)), ends[:-1] - 1)  # between successive members of one shard
    steps = shard[: total // STEP * STEP].reshape(-1, STEP)[:: max(1, total // STEP // 200)]
    met = [np.unique(step, return_counts=True)[1] for step in steps]
    return [
        "all" if window == shards else window,
        float(is_open.sum(1).mean()),
        int(np.abs(np.diff(position[::RANKS])).mean()),
        float(len(position[::RANKS]) / shards),
        int(travel.mean()),
        f"{(travel < STEP).mean():.2%}",
        float(np.mean([len(counts) for counts in met])),
        f"{np.mean([(counts * (counts - 1)).sum() / (STEP * (STEP - 1)) for counts in met]):.2%}",
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks order", description=__doc__)
    parser.add_argument("--lookups", type=int, default=10**6, help="slots of the test of memory, one at a time")
    chosen = parser.parse_args(arguments)
    samples = sum(int(sizes_of(shards).sum()) for shards in SHARDS)
    seeks = np.array(cold_seeks(5))
    print(f"\n{samples:,} samples in {' + '.join(map(str, SHARDS))} shards, weights {WEIGHTS}, window 64")
    rows = [[f"slot {SLOT:,}, from the sizes of the shards", *seeks[:, 0]], [f"then a step of {STEP:,} slots", *seeks[:, 1]]]
    print(table("Cold seek, milliseconds, each in a process of its own; goal: 100", ["", *"12345"], rows))
    before = private_megabytes()
    mixed = mixture()
    mixed.draws(np.array([SLOT]))
    print(f"\nMemory of the mixture with one epoch of each source: {private_megabytes() - before:.1f} MB")
    for title, count, stride, at_once in (
        (f"One slot at a time with stride {RANKS}; goal: 100 microseconds, private memory flat", chosen.lookups, RANKS, 1),
        (f"A step of {STEP:,} slots at a time", max(chosen.lookups, 200 * STEP), 1, STEP),
    ):
        lookups(mixed, 20 * at_once, stride, at_once, samples=1)  # what the first calls load is not the order's
        rows = [[f"{done:,}", micro, memory] for done, micro, memory in lookups(mixed, count, stride, at_once)]
        print(table(title, ["slots", "processor microseconds a slot", "private MB"], rows), flush=True)
    columns = [
        "window, shards", "shards open at once", f"samples between reads, one rank of {RANKS}", "reads a rank and shard",
        "neighbors travel, samples", f"within {STEP:,}", f"shards in a step of {STEP:,}", "pairs of a step from one shard",
    ]  # fmt: skip
    print(table("Reads and shuffling, 1,024 shards of 8,000", columns, [nearness(window) for window in (16, 64, 256, 1_024)]))
