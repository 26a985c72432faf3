"""The loss in pieces on sharded models: backward computes logits again with the shards that the root gathered."""

import functools
from functools import partial

import pytest
import training_runs as runs
from test_fsdp1 import FSDP1, assert_the_same, whole_weights
from test_two_processes import RATES, STEPS
from tiny import LLAMA, weights

from components import loss

STRATEGIES = {"sharded": (runs.hybrid(1, 2), weights), "replicated": (runs.hybrid(2, 1), weights), "fsdp1": (FSDP1, whole_weights)}
OFTEN = [("sharded", "all"), ("fsdp1", "all"), ("fsdp1", "decoder_frozen")]
CASES = [(strategy, rates) for rates in RATES for strategy in STRATEGIES]


def in_pieces(rates, strategy, read):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "MOST_LOGITS", 2 * LLAMA["vocab_size"])
        return runs.train(rates, STEPS, ranks=2, strategy=strategy, accumulate=2, clip=0.3, read=read)


@functools.cache
def of_one_process(rates):
    return runs.train(RATES[rates], STEPS, clip=0.3)


@pytest.mark.parametrize(("strategy", "rates"), [case if case in OFTEN else runs.slow(*case) for case in CASES])
def test_the_run_of_one_process(pair, strategy, rates):
    for run in pair.run(partial(in_pieces, RATES[rates], *STRATEGIES[strategy])):
        assert_the_same(run, of_one_process(rates))
