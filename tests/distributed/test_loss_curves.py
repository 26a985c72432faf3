"""Loss curves of up to twenty optimizer steps: FSDP2 on two and on four processes equals one process on the same global batch."""

import functools

import pytest
import training_runs as runs
from training_runs import CURVE_RATES, HELD_OUT, Run, deal, hybrid, slow, twenty_steps

MESHES = {
    "full shard": (2, hybrid(1, 2, activation_checkpointing="full")),
    "hybrid": (4, hybrid(2, 2, activation_checkpointing="full")),
}
ACCUMULATE = 2


@functools.cache
def of_one_process(number: int) -> Run:
    return runs.train(CURVE_RATES, twenty_steps()[:number], clip=0.3)


@pytest.mark.parametrize(("mesh", "number"), [("hybrid", 8), slow("hybrid", 20), slow("full shard", 20)])
def test_the_curve_of_one_process(request, mesh, number):
    """With accumulation, clipping, a frozen tower, activation checkpointing, and ranks without pictures in both kinds of step."""
    ranks, strategy = MESHES[mesh]
    processes = request.getfixturevalue("pair" if ranks == 2 else "quartet")
    expected = of_one_process(number)
    ours = processes.run(train, ranks, strategy, number, seconds=120)
    assert len(ours) == ranks
    for run in ours:
        for name in ("train/loss", "norm/gradient"):
            assert run.series(name) == pytest.approx(expected.series(name), rel=1e-5), name
        assert run.validation == pytest.approx(expected.validation, rel=1e-5)
    assert len(set(expected.series("train/loss"))) == number
    assert min(expected.series("norm/gradient")) > 0.3  # so that every step is clipped


def train(ranks, strategy, number):
    return runs.train(CURVE_RATES, twenty_steps()[:number], ranks=ranks, strategy=strategy, accumulate=ACCUMULATE, clip=0.3)


def test_some_ranks_have_no_pictures():
    dealt = [deal(twenty_steps(), 4, rank, ACCUMULATE) for rank in range(4)]
    counts = [[len(batch.pixels) for batch in batches] for batches in zip(*dealt, strict=True)]
    assert any(not all(each) and any(each) for each in counts)  # some have pictures while others have none
    assert any(not any(each) for each in counts)
    pictures = [sum(len(document.pixels) for document in row) for row in HELD_OUT]
    assert pictures[2] == 0 and all(pictures[:2])
