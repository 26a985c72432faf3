"""What FSDP2 sends in an optimizer step, counted: which unit is gathered and reduced how often."""

from collections import Counter

import pytest
import torch
import training_runs as runs
from lightning import Callback
from tiny import TOWER_FROZEN, built_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import hybrid, twenty_steps

from components.sharding.units import units

STEPS = 3
ACCUMULATE = 2
SMALL = 64  # sums over the ranks, such as the loss, are smaller than any unit


class Collectives(TorchDispatchMode):
    """Counts collectives by their kind and the elements of the larger side."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            elements = max((leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)), default=0)
            if elements > SMALL:
                self.counts[func.overloadpacket.__name__, elements] += 1
        return func(*args, **(kwargs or {}))


class Counting(Callback):
    """Counts from the first training step to the last."""

    def __init__(self):
        self.collectives = Collectives()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.collectives.__enter__()

    def on_train_end(self, trainer, pl_module):
        self.collectives.__exit__(None, None, None)


def counted(rates, strategy):
    counting = Counting()
    runs.train(rates, twenty_steps()[:STEPS], (), 4, strategy, ACCUMULATE, callbacks=[counting], limit_val_batches=0)
    return counting.collectives.counts


def padded(parameters, shards):
    return sum(-(-len(parameter) // shards) * shards * parameter[0].numel() for parameter in parameters)


def expected(rates, replicas, shards, scattered, gathered_twice):
    """The counts of a run whose gradients are reduced `scattered` times in a step, and its blocks gathered twice or once."""
    model, counts = built_model(rates), Counter()
    for unit in units(model, [block for part in model.parts.values() for block in part.blocks()]):
        twice = gathered_twice and unit.gradients_flow and unit.module is not model
        counts["_allgather_base_", padded(unit.parameters, shards)] += STEPS * ACCUMULATE * (2 if twice else 1)
        if trained := padded([parameter for parameter in unit.parameters if parameter.requires_grad], shards):
            counts["_reduce_scatter_base_", trained] += STEPS * scattered
            if replicas > 1:
                counts["allreduce_", trained // shards] += STEPS
    return counts


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("mesh", [(2, 2), (1, 4)])
def test_gradients_cross_the_groups_once_per_optimizer_step(quartet, mesh, deferred):
    for counts in quartet.run(counted, TOWER_FROZEN, hybrid(*mesh, defer_reduce_scatter=deferred)):
        assert counts == expected(TOWER_FROZEN, *mesh, 1 if deferred else ACCUMULATE, True)
