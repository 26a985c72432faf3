"""The loss in pieces on sharded models: backward computes logits again with the shards that the root gathered."""

from functools import partial

import pytest
import training_runs as runs
from test_fsdp1 import FSDP1, assert_the_same, whole_weights
from test_two_processes import STEPS
from tiny import ALL, DECODER_FROZEN, LLAMA, TOWER_FROZEN, weights

from components import loss


def in_pieces(rates, strategy, read):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "MOST_LOGITS", 2 * LLAMA["vocab_size"])
        return runs.train(rates, STEPS, ranks=2, strategy=strategy, accumulate=2, clip=0.3, read=read)


@pytest.mark.parametrize(
    ("strategy", "read"),
    [(runs.hybrid(1, 2), weights), pytest.param(runs.hybrid(2, 1), weights, marks=pytest.mark.slow), (FSDP1, whole_weights)],
    ids=["sharded", "replicated", "fsdp1"],
)
@pytest.mark.parametrize("rates", [ALL, pytest.param(TOWER_FROZEN, marks=pytest.mark.slow), DECODER_FROZEN])
def test_the_run_of_one_process(pair, rates, strategy, read):
    expected = runs.train(rates, STEPS, clip=0.3)
    for run in pair.run(partial(in_pieces, rates, strategy, read)):
        assert_the_same(run, expected)
