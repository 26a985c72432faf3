"""What FSDP2 sends in an optimizer step, counted: which unit is gathered and reduced how often."""

from collections import Counter

import pytest
import torch
import training_runs as runs
from lightning import Callback
from tiny import DECODER_FROZEN, TOWER_FROZEN, built_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import hybrid, slow, twenty_steps

from components.sharding import Layout
from components.sharding.units import units

STEPS = 2
ACCUMULATE = 2
SMALL = 64  # sums over the ranks, such as the loss, are smaller than any unit


class Collectives(TorchDispatchMode):
    """Counts collectives by their kind and the elements of the larger side; and the number formats of each kind."""

    def __init__(self):
        super().__init__()
        self.counts, self.formats = Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            elements = max((tensor.numel() for tensor in tensors), default=0)
            if elements > SMALL:
                self.counts[func.overloadpacket.__name__, elements] += 1
                self.formats.update((func.overloadpacket.__name__, tensor.dtype) for tensor in tensors)
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
    return counting.collectives.counts, counting.collectives.formats


def padded(parameters, shards):
    return sum(-(-len(parameter) // shards) * shards * parameter[0].numel() for parameter in parameters)


def expected(rates, mesh, **options):
    """The counts of a run in a layout."""
    layout, model, counts = Layout(*mesh, **options), built_model(rates), Counter()
    blocks = [block for part in model.parts.values() for block in part.blocks()]
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for unit in units(model, blocks, frozen if layout.replicate_frozen else ()):
        twice = layout.reshard_after_forward and unit.gradients_flow and unit.module is not model
        if (gathered := padded(unit.parameters, layout.shards)) and layout.shards > 1:
            counts["_allgather_base_", gathered] += STEPS * ACCUMULATE * (2 if twice else 1)
        if reduced := padded([parameter for parameter in unit.parameters if parameter.requires_grad], layout.shards):
            if layout.shards > 1:
                counts["_reduce_scatter_base_", reduced] += STEPS * (1 if layout.defer_reduce_scatter else ACCUMULATE)
            if layout.replicas > 1:
                counts["allreduce_", reduced // layout.shards] += STEPS
    return counts


@pytest.mark.parametrize(
    ("mesh", "deferred"), [((2, 2), False), ((2, 2), True), slow((1, 4), False), slow((1, 4), True), slow((4, 1), False)]
)
def test_gradients_cross_the_groups_once_per_optimizer_step(quartet, mesh, deferred):
    options = {"defer_reduce_scatter": deferred}
    for counts, _ in quartet.run(counted, TOWER_FROZEN, hybrid(*mesh, **options)):
        assert counts == expected(TOWER_FROZEN, mesh, **options)


@pytest.mark.parametrize(
    ("rates", "options"),
    [
        (TOWER_FROZEN, {"activation_checkpointing": "full"}),  # the pass that computes again gathers nothing
        slow(TOWER_FROZEN, {"reshard_after_forward": False}),
        slow(DECODER_FROZEN, {}),
        (DECODER_FROZEN, {"replicate_frozen": True}),
    ],
)
def test_what_a_layout_sends(quartet, rates, options):
    for counts, _ in quartet.run(counted, rates, hybrid(2, 2, **options)):
        assert counts == expected(rates, (2, 2), **options)


@pytest.mark.parametrize("reduce_dtype", [torch.float32, slow(torch.bfloat16)])
def test_number_formats(quartet, reduce_dtype):
    strategy = hybrid(2, 2, param_dtype="bfloat16", reduce_dtype=str(reduce_dtype).removeprefix("torch."))
    for _, formats in quartet.run(counted, TOWER_FROZEN, strategy):
        assert formats == {
            ("_allgather_base_", torch.bfloat16),
            ("_reduce_scatter_base_", reduce_dtype),
            ("allreduce_", reduce_dtype),
        }
