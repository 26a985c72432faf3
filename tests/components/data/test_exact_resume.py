"""Nothing skipped, nothing repeated: any run, interrupted anywhere and continued on any ranks, trains the samples of its steps."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from components.data import InstructionData, Sample, ShapesWorld
from components.turns import Turn
from tests.components.data.small_data import SHAPES, opened


class ShardedTexts(ShapesWorld):
    """Texts of unequal length in unequal shards, some of them empty."""

    def __init__(self, name: str, sizes: list[int], window: int, weight: float) -> None:
        super().__init__(SHAPES, num_scenes=sum(sizes), weight=weight)
        self.name, self.sizes, self.window = name, sizes, window

    def setup(self) -> None:
        super().setup()
        self.shard_sizes = np.array(self.sizes)

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        answer = "a " * (1 + index % 9) + "cross " * int(random.integers(1, 4))
        return Sample(f"{self.name} {index}", [Turn("user", "how many"), Turn("assistant", answer)], [])

    def estimate(self, indices: np.ndarray, tokens_per_image: int) -> np.ndarray:
        return 3 + indices % 9


class Case:
    """A mixture, a run of it, where it is interrupted, and on what it runs in between."""

    def __init__(self, number: int) -> None:
        random = np.random.default_rng(number)
        self.seed = int(random.integers(1000))
        self.sources = {
            f"source {i}": (random.integers(0, 40, int(random.integers(1, 9))).tolist() + [int(random.integers(1, 30))],
                            int(random.integers(1, 5)), float(random.uniform(0.05, 1)))
            for i in range(int(random.integers(1, 4)))
        }  # fmt: skip
        self.steps = int(random.integers(6, 30))
        self.changes = {int(random.integers(1, self.steps)): {"source 0": 0.5}} if random.random() < 0.5 else {}
        self.interruptions = sorted({0, *random.integers(1, self.steps, int(random.integers(1, 4))).tolist()})
        self.lives = [
            (int(random.choice([1, 2, 4])), int(random.choice([1, 2, 4])), int(random.choice([0, 0, 1, 2])))
            for _ in self.interruptions
        ]  # ranks, accumulation, workers

    def data(self, folder: Path, rank: int, ranks: int, accumulate: int, workers: int, step: int) -> InstructionData:
        sources = {name: ShardedTexts(name, *of) for name, of in self.sources.items()}
        return opened(
            sources, folder, rank=rank, ranks=ranks, accumulate=accumulate, step=step, global_batch_size=16, seed=self.seed,
            num_workers=workers, weight_changes=self.changes, max_steps=self.steps,
        )  # fmt: skip

    def steps_of(self, folder: Path, life: tuple[int, int, int], first: int, end: int) -> list[list[tuple]]:
        """What all ranks together train in the optimizer steps of a life: names and tokens of the samples, sorted."""
        ranks, accumulate, workers = life
        steps: list[list[tuple]] = [[] for _ in range(first, end)]
        for rank in range(ranks):
            batches = iter(self.data(folder, rank, ranks, accumulate, workers, first).train_dataloader())
            for step in steps:
                for _ in range(accumulate):
                    batch = next(batches)
                    ends = batch.cumulative_lengths.tolist()
                    rows = [tuple(batch.input_ids[a:b].tolist()) for a, b in pairwise(ends)]
                    step += zip(batch.sample_ids, rows, strict=True)
        return [sorted(step) for step in steps]


@pytest.mark.parametrize("number", [*range(4), *(pytest.param(number, marks=pytest.mark.slow) for number in range(4, 24))])
def test_interrupted_anywhere_and_continued_on_any_ranks(number: int, tmp_path: Path) -> None:
    case = Case(number)
    whole = case.steps_of(tmp_path, (1, 1, 0), 0, case.steps)
    ends = [*case.interruptions[1:], case.steps]
    lives = [
        case.steps_of(tmp_path, life, first, end) for life, first, end in zip(case.lives, case.interruptions, ends, strict=True)
    ]
    assert [step for life in lives for step in life] == whole
    assert all(len(step) == 16 for step in whole)


def test_two_ranks_then_one_then_four(tmp_path: Path) -> None:
    case = Case(44)
    case.steps, case.changes = 9, {5: {"source 0": 0.5}}
    whole = case.steps_of(tmp_path, (1, 1, 0), 0, 9)
    lives = [((2, 2, 0), 0, 4), ((1, 1, 0), 4, 7), ((4, 1, 0), 7, 9)]
    assert [step for life in lives for step in case.steps_of(tmp_path, *life)] == whole


@pytest.mark.parametrize("number", [*range(24, 31), *(pytest.param(number, marks=pytest.mark.slow) for number in range(31, 44))])
def test_every_epoch_of_every_source_is_dealt_exactly_once(number: int, tmp_path: Path) -> None:
    """To any ranks and micro-batches: a source that has been drawn d times has given each sample d // n or d // n + 1 times."""
    case = Case(number)
    case.steps = 300
    ranks, accumulate, _ = case.lives[0]
    batches = case.data(tmp_path, 0, ranks, accumulate, 0, 0).train_dataloader().dataset
    dealt: Counter[tuple[str, int]] = Counter()
    for step in range(case.steps):
        samples, hands = batches.deal_step(step)
        dealt.update(samples[i] for micro_batch in hands for hand in micro_batch for i in hand)
    drawn = batches.mixture.drawn(case.steps * 16).tolist()
    assert sum(drawn) == dealt.total() == case.steps * 16
    for (name, (sizes, _, _)), draws in zip(case.sources.items(), drawn, strict=True):
        counts = [dealt[name, index] for index in range(sum(sizes))]
        assert sum(counts) == draws
        assert set(counts) <= {draws // sum(sizes), -(-draws // sum(sizes))}
    assert max(draws / sum(sizes) for (sizes, _, _), draws in zip(case.sources.values(), drawn, strict=True)) > 2
