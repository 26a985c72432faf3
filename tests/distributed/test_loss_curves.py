"""Loss curves of twenty optimizer steps: FSDP2 on two and on four processes equals one process on the same global batch."""

import functools

import pytest
import runs
from runs import CURVE_RATES, hybrid, twenty_steps

MESHES = {"full shard": (2, hybrid(1, 2)), "hybrid": (4, hybrid(2, 2))}


@functools.cache
def one_process():
    return runs.train(CURVE_RATES, twenty_steps(), clip=0.3)


def train(ranks, strategy, accumulate):
    return runs.train(CURVE_RATES, twenty_steps(), ranks=ranks, strategy=strategy, accumulate=accumulate, clip=0.3)


def assert_the_same(run, expected):
    for name in ("train/loss", "norm/gradient"):
        assert run.series(name) == pytest.approx(expected.series(name), rel=1e-5), name


@pytest.mark.parametrize("mesh", MESHES)
def test_the_curve_of_one_process(request, mesh):
    ranks, strategy = MESHES[mesh]
    processes = request.getfixturevalue("pair" if ranks == 2 else "quartet")
    for run in processes.run(train, ranks, strategy, 2, seconds=120):
        assert_the_same(run, one_process())
