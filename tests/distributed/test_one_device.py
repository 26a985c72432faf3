"""One process that shards nothing: the run as without a strategy, with compiled blocks, and frozen parts in their own precision."""

import os
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import training_runs as runs
from lightning import Callback
from tiny import TOWER_FROZEN, tiny_document
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import CURVE_RATES, hybrid, twenty_steps

from components.sharding import HybridSharding

STEPS = twenty_steps()[:3]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """The run may make a process group of its own, of which nothing is left."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Asked(Callback):
    """What the model says at the end, and how many tokens its blocks see for it at a time."""

    def on_train_end(self, trainer, pl_module):
        pl_module.eval()
        prompts = [tiny_document(6, (0,)), tiny_document(9)]
        widths = []
        hook = pl_module.decoder.blocks()[0].register_forward_hook(lambda block, given, output: widths.append(output.shape[1]))
        self.answers = pl_module.generate_ids(prompts, 5, end_token_id=2), widths
        hook.remove()


def assert_equal_to_plain(tolerance, **options):
    ran = []
    for strategy in (lambda: "auto", hybrid(1, 1, **options)):
        asked = Asked()
        run = runs.train(CURVE_RATES, STEPS, clip=0.3, accumulate=2, callbacks=[asked], strategy=strategy)
        ran.append((run, asked.answers))
    (plain, expected), (run, answers) = ran
    for name in ("train/loss", "norm/gradient"):
        assert run.series(name) == pytest.approx(plain.series(name), rel=tolerance, abs=0), name
    assert run.validation == pytest.approx(plain.validation, rel=tolerance, abs=0)
    assert answers == expected
    assert run.weights.keys() == plain.weights.keys()
    if not tolerance:
        assert all(torch.equal(tensor, plain.weights[name]) for name, tensor in run.weights.items())


def test_equals_the_run_without_a_strategy():
    assert_equal_to_plain(0.0, replicate_frozen=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": "selective"}, {"reshard_after_forward": False}])
def test_options_equal_the_run_without_a_strategy(options):
    assert_equal_to_plain(0.0, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # as in test_compilation.py
def test_compiled_blocks_equal_the_run_without_a_strategy(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert_equal_to_plain(1e-5, compile_blocks=True, replicate_frozen=True)


class Copies(TorchDispatchMode):
    """Counts how often FSDP2 copies gradients together, and how often it copies what it has copied together."""

    def __init__(self):
        super().__init__()
        self.together, self.again = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fsdp.chunk_cat.default:
            self.together.append(kwargs["out"].data_ptr())
        if func is torch.ops.aten.copy_.default and args[0] is not args[1]:
            self.again += args[1].data_ptr() in self.together
        return func(*args, **(kwargs or {}))


class Counting(Callback):
    """Counts in the backward pass of the first micro-batch of two, and of the second."""

    def on_before_backward(self, trainer, pl_module, loss):
        self.copies = Copies()
        self.copies.__enter__()

    def on_after_backward(self, trainer, pl_module):
        self.copies.__exit__(None, None, None)
        is_last = trainer.fit_loop.epoch_loop.batch_idx % 2
        assert (len(self.copies.together) > len(pl_module.decoder.blocks())) == is_last
        assert self.copies.again == 0


def test_gradients_are_copied_in_the_last_micro_batch_alone():
    """FSDP2 copies those of a unit together, and then to itself; with several micro-batches it would do so for each."""
    runs.train(CURVE_RATES, STEPS, accumulate=2, callbacks=[Counting()], strategy=hybrid(1, 1))


class EveryMicroBatch(HybridSharding):
    """Gradients are reduced, and found in their place, after each micro-batch."""

    @contextmanager
    def block_backward_sync(self):
        yield


class Waiting(Callback):
    """Number formats of the gradients of all blocks after the first micro-batch of two."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.epoch_loop.batch_idx % 2 == 0:
            block = pl_module.decoder.blocks()[0]
            parameters = block._get_fsdp_state()._fsdp_param_group.fsdp_params
            self.formats = {parameter.unsharded_accumulated_grad.dtype for parameter in parameters}


def test_gradients_wait_in_float32():
    """The sums are those of gradients that are reduced one by one."""
    waiting = Waiting()
    run = runs.train(CURVE_RATES, STEPS, clip=0.3, accumulate=2, callbacks=[waiting], strategy=hybrid(1, 1, param_dtype="bfloat16"))
    plain = runs.train(CURVE_RATES, STEPS, clip=0.3, accumulate=2, strategy=partial(EveryMicroBatch, 1, 1, "bfloat16"))
    assert waiting.formats == {torch.float32}
    assert run.steps == plain.steps
    assert all(torch.equal(tensor, plain.weights[name]) for name, tensor in run.weights.items())


def test_gradients_of_lower_precision_are_added_up_in_their_place():
    """In which they are float32."""
    how = {"param_dtype": "bfloat16", "reduce_dtype": "bfloat16"}
    run, plain = (
        runs.train(CURVE_RATES, STEPS, accumulate=2, strategy=partial(strategy, 1, 1, **how))
        for strategy in (HybridSharding, EveryMicroBatch)
    )
    assert run.steps == plain.steps


def test_frozen_parts_are_held_in_the_precision_that_they_are_used_in():
    strategy = partial(HybridSharding, 1, 1, replicate_frozen=True)
    for name, tensor in runs.train(TOWER_FROZEN, STEPS[:2], strategy=strategy).weights.items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith("vision_tower") else torch.float32), name
