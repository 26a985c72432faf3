"""How even the tokens of ranks are when steps are dealt by length, on the lengths of LLaVA's 665K mix.

Lengths are modelled from the published counts of its parts (Liu et al. 2023, arXiv 2310.03744): lognormal texts, 38 tokens of
system prompt, 576 of a picture, cut at 2048. `--lengths FILE.npy` takes measured ones.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from components.data.order import deal
from tests.benchmarks import table

PARTS = {  # samples, median and sigma of the text's tokens, pictures
    "conversation": (58_000, 330, 0.30, 1), "detail": (23_000, 130, 0.25, 1), "complex": (77_000, 230, 0.25, 1),
    "sharegpt": (40_688, 1_300, 0.95, 0), "vqav2": (83_000, 95, 0.55, 1), "gqa": (72_000, 230, 0.45, 1),
    "ocrvqa": (80_000, 140, 0.35, 1), "aokvqa": (66_000, 80, 0.25, 1), "textcaps": (22_000, 70, 0.30, 1),
    "refcoco": (48_000, 300, 0.70, 1), "visual genome": (86_000, 400, 0.50, 1), "okvqa": (9_000, 30, 0.30, 1),
}  # fmt: skip
NODE = 8
SETTINGS = [(ranks, *step) for step in ((1, 16), (16, 1), (16, 2), (16, 16)) for ranks in (8, 128)]
"""Ranks, micro-batches of a step, samples of a micro-batch."""

Step = list[list[list[int]]]
"""`[micro_batch][rank]` -> numbers of samples."""


def modelled_lengths(seed: int = 0) -> np.ndarray:
    """Tokens of each sample; those of text-only samples negative."""
    random = np.random.default_rng(seed)
    parts = []
    for count, median, sigma, pictures in PARTS.values():
        text = random.lognormal(np.log(median), sigma, count).astype(np.int64)
        parts.append(np.minimum(text + 38 + 576 * pictures, 2_048) * (1 if pictures else -1))
    return random.permutation(np.concatenate(parts))


def dealt(lengths: np.ndarray, ranks: int, micro_batches: int, samples: int) -> Iterator[Step]:
    """Ours: the samples of a step, in random order, dealt by length."""
    for first in range(0, len(lengths), ranks * micro_batches * samples):
        hands = deal(np.abs(lengths[first : first + ranks * micro_batches * samples]).tolist(), ranks, micro_batches)
        yield [[[first + number for number in hand] for hand in micro_batch] for micro_batch in hands]


def in_order(lengths: np.ndarray, ranks: int, micro_batches: int, samples: int) -> Iterator[Step]:
    """Random dealing: the samples as they come."""
    yield from np.arange(len(lengths)).reshape(-1, micro_batches, ranks, samples).tolist()


def length_grouped(lengths: np.ndarray, ranks: int, micro_batches: int, samples: int) -> Iterator[Step]:
    """LLaVA's `group_by_modality_length`: mega-batches of one modality, dealt longest first into equal counts."""
    random = np.random.default_rng(0)
    workers, mega_batches, rest = ranks * micro_batches, [], []
    for numbers in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)):
        whole = len(numbers) // (workers * samples) * workers * samples
        mega_batches += random.permutation(numbers)[:whole].reshape(-1, workers * samples).tolist()
        rest += numbers[whole:].tolist()
    mega_batches = [mega_batches[number] for number in random.permutation(len(mega_batches))]
    if len(rest) == workers * samples:
        mega_batches.append(rest)
    for numbers in mega_batches:
        chunks: list[list[int]] = [[] for _ in range(workers)]
        loads = np.zeros(workers)
        for number in sorted(numbers, key=lambda number: -abs(lengths[number])):
            lightest = int(loads.argmin())
            chunks[lightest].append(number)
            loads[lightest] += abs(lengths[number])
            if len(chunks[lightest]) == samples:
                loads[lightest] = np.inf
        yield [chunks[first : first + ranks] for first in range(0, workers, ranks)]


def slowest_to_mean(
    lengths: np.ndarray, ranks: int, micro_batches: int, samples: int, steps: int, how: Callable[..., Iterator[Step]], padded: bool
) -> dict[str, float]:
    """Tokens of the slowest against the mean, where all ranks meet in every micro-step, where the ranks of a node do and nodes once
    in a step (a hybrid mesh), and where ranks meet once in a step; padding; the largest micro-batch."""
    wanted = steps * ranks * micro_batches * samples
    lengths = np.resize(lengths, wanted)
    tokens = np.abs(lengths)
    useful, waited, largest, taken = 0, np.zeros(3), 0, 0
    processed = 0
    for step in how(lengths, ranks, micro_batches, samples):
        hands = [[tokens[hand] for hand in micro_batch] for micro_batch in step]
        load = np.array([[hand.max() * len(hand) if padded else hand.sum() for hand in micro_batch] for micro_batch in hands])
        useful += sum(int(hand.sum()) for micro_batch in hands for hand in micro_batch)
        processed += int(load.sum())
        nodes = load.reshape(micro_batches, -1, min(NODE, ranks))
        waited += [load.max(1).sum(), nodes.max(2).sum(0).max(), load.sum(0).max()]
        largest, taken = max(largest, int(load.max())), taken + 1
    slowest = waited * ranks / processed
    return {
        "micro_step": float(slowest[0]), "node": float(slowest[1]), "step": float(slowest[2]),
        "padding": processed - useful, "share": 1 - useful / processed, "largest": largest, "steps": taken,
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks packing", description=__doc__)
    parser.add_argument("--lengths", type=Path, help=".npy of tokens of each sample; those of text-only samples negative")
    parser.add_argument("--samples", type=int, default=200_000, help="samples that are dealt in each setting, and at least 4 steps")
    chosen = parser.parse_args(arguments)
    lengths = modelled_lengths() if chosen.lengths is None else np.random.default_rng(0).permutation(np.load(chosen.lengths))
    tokens = np.abs(lengths)
    print(
        f"\n{len(lengths):,} samples, mean {tokens.mean():.0f} tokens, p5/50/95/99 = "
        f"{'/'.join(f'{value:.0f}' for value in np.percentile(tokens, [5, 50, 95, 99]))}, {(lengths < 0).mean():.1%} text-only"
    )
    ways = (
        ("dealt", dealt, False),
        ("random", in_order, False),
        ("random, padded", in_order, True),
        ("LLaVA, padded", length_grouped, True),
    )
    for ranks, micro_batches, samples in SETTINGS:
        steps = max(4, chosen.samples // (ranks * micro_batches * samples))
        rows = []
        for name, how, padded in ways:
            found = slowest_to_mean(lengths, ranks, micro_batches, samples, steps, how, padded)
            row = [found["micro_step"], found["node"], found["step"], f"{found['padding']:,}", f"{found['share']:.1%}"]
            rows.append([name, *row, f"{found['largest']:,}", found["steps"]])
        title = (
            f"{ranks} ranks, accumulation {micro_batches}, {samples} samples a micro-batch: slowest/mean tokens where ranks meet"
        )
        columns = [
            "",
            "every micro-step",
            f"so in nodes of {NODE}",
            "every step",
            "padding tokens",
            "share",
            "largest micro-batch",
            "steps",
        ]
        print(table(title, columns, rows), flush=True)
    rows = []
    for ranks, micro_batches in ((8, 16), (128, 1), (128, 16), (2_048, 1)):
        some = tokens[:2_048].tolist()
        spent = []
        for _ in range(20):
            began = time.process_time()
            deal(some, ranks, micro_batches)
            spent.append((time.process_time() - began) * 1e3)
        rows.append([ranks, micro_batches, float(np.median(spent)), max(spent)])
    print(
        table(
            "deal of 2,048 samples, processor milliseconds; goal: 20", ["ranks", "micro-batches", "median of 20", "longest"], rows
        )
    )
