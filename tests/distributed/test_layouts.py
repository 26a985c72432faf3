"""Every option of a layout, alone, on a hybrid mesh of two replicas and two shards: the run is what it is without the option."""

import functools
import math
from functools import partial

import pytest
import torch
import training_runs as runs
from lightning import Callback
from test_two_processes import STEPS as WITHOUT_TARGETS
from tiny import ALL, DECODER_FROZEN, Prepared, tiny_batch, tiny_model, tiny_trainer
from training_runs import CURVE_RATES, adapted_model, hybrid, slow, twenty_steps

STEPS = twenty_steps()[:4]
MODELS = {
    "all trains": (ALL, tiny_model),
    "tower frozen": (CURVE_RATES, tiny_model),
    "decoder frozen": (DECODER_FROZEN, tiny_model),
    "adapters": (CURVE_RATES, partial(adapted_model, dropout=0.5)),  # recomputation has to draw the same numbers
}
OPTIONS = [
    slow("all trains", {"reshard_after_forward": False}),
    slow("all trains", {"activation_checkpointing": "full"}),
    slow("all trains", {"activation_checkpointing": "selective"}),
    ("adapters", {"activation_checkpointing": "full"}),
    slow("adapters", {"activation_checkpointing": "selective"}),
    slow("adapters", {"replicate_frozen": True}),
    slow("tower frozen", {"replicate_frozen": True}),
    slow("decoder frozen", {"replicate_frozen": True}),
    ("decoder frozen", {"replicate_frozen": True, "activation_checkpointing": "selective", "reshard_after_forward": False}),
]


def train(trained, options, **others):
    rates, make = MODELS[trained]
    strategy = hybrid(2, 2, **{"param_dtype": "bfloat16", **options})
    return runs.train(rates, STEPS, ranks=4, strategy=strategy, accumulate=2, clip=0.3, make=make, **others)


@functools.cache
def plain(quartet, trained):
    return quartet.run(train, trained, {})[0]


def assert_same_weights(ours, theirs):
    """Frozen parameters may be whole in the number format of the computation, in which they are used anyway."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name].bfloat16(), expected.bfloat16()), name


@pytest.mark.parametrize(("trained", "options"), OPTIONS)
def test_an_option_changes_no_bit(quartet, trained, options):
    expected = plain(quartet, trained)
    assert len(set(expected.series("train/loss"))) == len(STEPS)
    for run in quartet.run(train, trained, options):
        assert (run.steps, run.validation) == (expected.steps, expected.validation)
        assert_same_weights(run.weights, expected.weights)
        halves = {name for name, tensor in run.weights.items() if tensor.dtype == torch.bfloat16}
        assert bool(halves) == bool(options.get("replicate_frozen"))


@pytest.mark.parametrize(
    ("mesh", "steps"), [((2, 2), STEPS), slow((1, 4), STEPS), ((1, 2), WITHOUT_TARGETS), slow((2, 1), WITHOUT_TARGETS)]
)
def test_deferred_reduction(request, mesh, steps):
    """The micro-batches are added up in another order, so that bits may change. Where a group is one rank, this is always so."""
    processes = request.getfixturevalue("pair" if math.prod(mesh) == 2 else "quartet")
    expected = runs.train(CURVE_RATES, steps, clip=0.3)
    for run in processes.run(deferred, mesh, steps):
        for name in ("train/loss", "norm/gradient"):
            assert run.series(name) == pytest.approx(expected.series(name), rel=1e-5), name
        assert run.validation == pytest.approx(expected.validation, rel=1e-5)


def deferred(mesh, steps):
    strategy = hybrid(*mesh, defer_reduce_scatter=mesh[1] > 1)
    return runs.train(CURVE_RATES, steps, ranks=math.prod(mesh), strategy=strategy, accumulate=2, clip=0.3)


class Saving(Callback):
    """Saves after the second optimizer step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            trainer.save_checkpoint(self.folder)


def begun(folder, options):
    return train("decoder frozen", options, callbacks=[Saving(folder)])


def continued(folder, options):
    return train("decoder frozen", options, ckpt_path=folder)


OTHER = {"replicate_frozen": True, "activation_checkpointing": "full", "reshard_after_forward": False}


@pytest.mark.parametrize(("before", "after"), [({}, OTHER), slow(OTHER, {})])
def test_a_run_continues_in_another_layout(quartet, tmp_path, before, after):
    """The names in a checkpoint, and what they stand for, do not depend on the layout."""
    folder = str(tmp_path / "state")
    expected = quartet.run(begun, folder, before)[0]
    for run in quartet.run(continued, folder, after):
        for name in ("train/loss", "norm/gradient"):
            assert run.series(name) == expected.series(name)[2:]
        assert_same_weights(run.weights, expected.weights)


@pytest.mark.parametrize(
    ("recomputed", "backend", "number"), [("none", "eager", 2), slow("none", "aot_eager", 4), slow("full", "aot_eager", 4)]
)
def test_compiled_blocks(pair, recomputed, backend, number):
    """A compiler takes longer than all that it compiles: two steps without a validation in the shortest case."""
    options = {} if number == len(STEPS) else {"limit_val_batches": 0}
    expected = runs.train(CURVE_RATES, STEPS[:number], clip=0.3, **options)
    for run, graphs in pair.run(compiled, recomputed, backend, number, options, seconds=240):
        assert graphs > 0
        for name in ("train/loss", "norm/gradient"):
            assert run.series(name) == pytest.approx(expected.series(name), rel=1e-5), name
        assert run.validation == pytest.approx(expected.validation, rel=1e-5)
        assert run.weights.keys() == expected.weights.keys()


def compiled(recomputed, backend, number, options):
    """A run with compiled blocks, by a compiler that needs none of the machine's, and how many graphs it has compiled."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    strategy = hybrid(1, 2, compile_blocks=True, activation_checkpointing=recomputed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        run = runs.train(CURVE_RATES, STEPS[:number], ranks=2, strategy=strategy, accumulate=2, clip=0.3, **options)
    assert not counters["recompile_limit"]
    return run, counters["stats"]["unique_graphs"]


def test_the_loss_of_a_validation_alone(pair):
    """Lightning validates in inference mode where it can, which it cannot with gloo."""
    assert pair.run(validation) == [{"val/loss/other": pytest.approx(validation(1)["val/loss/other"], rel=1e-5)}] * 2


def validation(ranks=2):
    strategy = hybrid(2, 1)() if ranks == 2 else "auto"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning.pytorch.loops.utilities._distributed_is_initialized", lambda: False)
        trainer = tiny_trainer(devices=ranks, strategy=strategy, limit_val_batches=1.0)
        [losses] = trainer.validate(tiny_model(ALL), datamodule=Prepared([], {"other": [tiny_batch()]}), verbose=False)
    return losses
