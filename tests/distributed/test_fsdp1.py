"""FSDP1 computes what one process does: loss curves, ranks without pictures, adapters, checkpoints, generation, the probe."""

import functools
import io
import os
from contextlib import redirect_stdout
from functools import partial

import pytest
import torch
import training_runs as runs
from lightning import Callback
from test_two_processes import ASKED, STEPS, Answers, answers_of_one_process, without_a_mask
from test_two_processes import answers as answers_of_one
from tiny import (
    ALL,
    DECODER_FROZEN,
    TOWER_FROZEN,
    Prepared,
    Record,
    _without_key_bias,
    assert_equal,
    built_model,
    tiny_document,
    tiny_documents,
    tiny_model,
    tiny_trainer,
    weights,
    whole,
)
from training_runs import CURVE_RATES, adapted_model, deal, rank_of, slow, twenty_steps

from callbacks.checkpoint import Checkpoint
from callbacks.overview import Overview
from callbacks.throughput import Throughput
from components.causality import prove_causal
from components.checkpoint_files import load_weights
from components.decoder import attention
from components.errors import RecipeError
from components.flops import matmul_parameters
from components.run_folder import RECIPE, STATE, checkpoint_folder
from components.sharding import FullyShardedV1
from components.sharding import fsdp1 as fsdp1_module


def fsdp1(replicas, shards, **options):
    return partial(FullyShardedV1, replicas, shards, **{"param_dtype": "float32", **options})


FSDP1 = fsdp1(1, 2)


def whole_weights(model):
    return _without_key_bias({name: whole(shard) for name, shard in model.trainer.strategy.lightning_module_state_dict().items()})


def train(rates, steps, ranks=2, strategy=FSDP1, **options):
    return runs.train(rates, steps, ranks=ranks, strategy=strategy, read=whole_weights, **options)


def assert_the_same(run, expected):
    for name in ("train/loss", "norm/gradient"):
        assert run.series(name) == pytest.approx(expected.series(name), rel=1e-5), name
    assert run.validation == pytest.approx(expected.validation, rel=1e-5)
    assert_equal(run.weights, expected.weights, 1e-4)


@functools.cache
def curve_of_one():
    return runs.train(CURVE_RATES, twenty_steps(), clip=0.3)


@pytest.mark.parametrize("recomputed", ["full", slow("none"), slow("selective")])
def test_the_curve_of_one_process(pair, recomputed):
    strategy = fsdp1(1, 2, activation_checkpointing=recomputed)
    for run in pair.run(partial(train, CURVE_RATES, twenty_steps(), strategy=strategy, accumulate=2, clip=0.3)):
        assert_the_same(run, curve_of_one())


@pytest.mark.slow
def test_the_curve_of_one_process_on_replicas(quartet):
    for run in quartet.run(partial(train, CURVE_RATES, twenty_steps(), 4, fsdp1(2, 2), accumulate=2, clip=0.3)):
        assert_the_same(run, curve_of_one())


@pytest.mark.parametrize(
    ("rates", "make"), [slow(ALL, tiny_model), slow(DECODER_FROZEN, tiny_model), (TOWER_FROZEN, adapted_model)]
)
def test_frozen_parts_and_adapters(pair, rates, make):
    """Among the steps: a rank without pictures, no picture anywhere, nothing to learn from."""
    expected = runs.train(rates, STEPS, clip=0.3, make=make)
    for run in pair.run(partial(train, rates, STEPS, accumulate=2, clip=0.3, make=make)):
        assert_the_same(run, expected)


def reduced_dtypes(reduce_dtype):
    """A run in bfloat16, and the number formats in which its gradients were reduced."""
    names = {"reduce_scatter_tensor", "reduce_scatter_single"} & vars(torch.distributed).keys()  # by version of torch
    dtypes = set()

    def noting(real):
        def noted(output, tensor, *arguments, **options):
            dtypes.add(tensor.dtype)
            return real(output, tensor, *arguments, **options)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.distributed, name, noting(getattr(torch.distributed, name)))
        strategy = fsdp1(1, 2, param_dtype="bfloat16", reduce_dtype=reduce_dtype)
        return train(TOWER_FROZEN, STEPS, strategy=strategy, accumulate=2, clip=1.0), dtypes


@pytest.mark.parametrize("reduce_dtype", ["float32", slow("bfloat16")])
def test_bfloat16_computation_with_float32_shards(pair, reduce_dtype):
    expected = runs.train(TOWER_FROZEN, STEPS, clip=1.0).series("train/loss")
    for run, dtypes in pair.run(reduced_dtypes, reduce_dtype):
        assert dtypes == {getattr(torch, reduce_dtype)}
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in run.weights.values())
        difference = [abs(ours - theirs) for ours, theirs in zip(run.series("train/loss"), expected, strict=True)]
        assert 0 < max(difference) < 0.1


def saved_run(folder, steps):
    """A run with a checkpoint at every fourth step."""
    options = {"callbacks": [Checkpoint(every_n_steps=4, keep=3)], "enable_checkpointing": True, "default_root_dir": folder}
    return train(TOWER_FROZEN, steps, accumulate=2, clip=0.3, **options)


def resumed_run(folder, steps, state):
    """The rest of that run."""
    model, record = tiny_model(TOWER_FROZEN, weight_decay=0.1), Record()
    trainer = tiny_trainer(2, callbacks=[record], devices=2, strategy=FSDP1(), gradient_clip_val=0.3, default_root_dir=folder)
    trainer.ckpt_path = state  # known before the model is built, which then reads no other weights
    trainer.fit(model, datamodule=Prepared(deal(steps, 2, rank_of(2), 2)))
    return record.steps, whole_weights(model)


def refused_run(*arguments):
    """What is said of that rest if the weights of the checkpoint do not arrive."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp1_module, "set_model_state_dict", lambda model, weights: None)
        with pytest.raises(RecipeError) as error:
            resumed_run(*arguments)
    return str(error.value)


def test_a_checkpoint_loads_into_a_whole_model_and_resumes_bitwise(pair, tmp_path):
    (tmp_path / RECIPE).write_text("model: tiny\n")
    steps = twenty_steps(4)[:8]
    run = pair.run(saved_run, str(tmp_path), steps)[0]
    model = built_model()
    load_weights(model, checkpoint_folder(tmp_path, 8), "--ckpt")
    assert all(torch.equal(tensor, run.weights[name]) for name, tensor in weights(model).items())

    rest = (str(tmp_path), steps, str(checkpoint_folder(tmp_path, 4) / STATE))
    for logged, resumed in pair.run(resumed_run, *rest):
        for name in ("train/loss", "norm/gradient"):
            assert [step[name] for step in logged] == run.series(name)[4:]
        assert all(torch.equal(tensor, run.weights[name]) for name, tensor in resumed.items())
    for message in pair.run(refused_run, *rest):
        assert "these hold NaN or infinite numbers" in message


def validated(folder, steps, state):
    """The weights of that checkpoint on another mesh, which does not train."""
    trainer = tiny_trainer(devices=4, strategy=fsdp1(2, 2)(), default_root_dir=folder, limit_val_batches=1)
    trainer.ckpt_path = state
    model = tiny_model(TOWER_FROZEN)
    trainer.validate(model, datamodule=Prepared([], {"held_out": deal(steps, 4, rank_of(4), 1)}), verbose=False)
    return whole_weights(model)


@pytest.mark.slow
def test_a_checkpoint_is_validated_on_any_mesh(pair, quartet, tmp_path):
    (tmp_path / RECIPE).write_text("model: tiny\n")
    steps = twenty_steps(4)[:4]
    expected = pair.run(saved_run, str(tmp_path), steps)[0].weights
    for loaded in quartet.run(validated, str(tmp_path), steps, str(checkpoint_folder(tmp_path, 4) / STATE)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def probed(param_dtype):
    """What the causality probe says of a live model, what it leaves behind, and what it says of one that is not causal."""
    probe = Probe()
    train(ALL, STEPS, strategy=fsdp1(1, 2, param_dtype=param_dtype), callbacks=[probe], make=adapted_model)
    return probe.difference, probe.kept, probe.message


class Probe(Callback):
    """Probes before the first step."""

    def on_train_start(self, trainer, pl_module):
        before, modes = whole_weights(pl_module), [module.training for module in pl_module.modules()]
        self.difference = prove_causal(pl_module)
        self.kept = all(torch.equal(value, before[name]) for name, value in whole_weights(pl_module).items())
        self.kept &= modes == [module.training for module in pl_module.modules()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_per_document", without_a_mask)
            with pytest.raises(RuntimeError) as error:
                prove_causal(pl_module)
        self.message = str(error.value)


@pytest.mark.parametrize("param_dtype", [slow("float32"), "bfloat16"])
def test_the_causality_probe(pair, param_dtype):
    for difference, kept, message in pair.run(probed, param_dtype):
        assert (difference, kept) == (0, True)
        assert "not causal" in message


def answers(shares, end):
    """What this rank's prompts are answered with along a run."""
    asked = Answers(shares[rank_of(2)], end)
    trainer = tiny_trainer(callbacks=[asked], devices=2, strategy=FSDP1())
    trainer.fit(tiny_model(TOWER_FROZEN), datamodule=Prepared(deal(STEPS, 2, rank_of(2), 1)))
    return asked.answers


@pytest.mark.parametrize("asked", [slow("pictures of their own"), "one picture"])
def test_generation_before_and_after_training_steps(pair, asked):
    first, second = pair.run(answers, ASKED[asked], 2)
    expected = answers_of_one_process("tower_frozen", asked)
    assert [ours + theirs for ours, theirs in zip(first, second, strict=True)] == expected


@pytest.mark.slow
def test_a_rank_whose_answers_end_early_takes_part_until_the_other_is_done(pair):
    shares = [[tiny_document(9)], tiny_documents()[:2]]
    end = int(answers_of_one(None, shares)[0][0].split()[1])
    expected = answers_of_one(None, shares, end)
    assert len(expected[0][0].split()) <= 1 and all(len(answer.split()) == 6 for answer in expected[0][1:])
    first, second = pair.run(answers, shares, end)
    assert [ours + theirs for ours, theirs in zip(first, second, strict=True)] == expected


def first_lines():
    """What a run prints before its first step, and what its throughput is reckoned with."""
    printed = io.StringIO()
    throughput = Throughput()
    trainer = tiny_trainer(callbacks=[Overview(), throughput], devices=2, strategy=FullyShardedV1(1, 2))
    with redirect_stdout(printed):
        trainer.fit(tiny_model(), datamodule=Prepared(deal(STEPS, 2, rank_of(2), 1)))
    return printed.getvalue(), throughput.sizes


def test_sizes_are_those_of_whole_parameters(pair):
    (first, reckoned), (second, _) = pair.run(first_lines)
    model = built_model()
    assert reckoned == matmul_parameters(model)
    sizes = {name: f"{sum(p.numel() for p in part.parameters()):,}" for name, part in model.parts.items()}
    lines = [line.split() for line in first.splitlines()]
    assert [[line[1], line[2]] for line in lines if line[0] in sizes] == [[size, size] for size in sizes.values()]
    assert "compute bfloat16, storage float32, reduce float32; 2 ranks on cpu" in first.splitlines()
    assert second == ""


def refusal(replicas, shards, **options):
    trainer = tiny_trainer(devices=2, strategy=FullyShardedV1(replicas, shards), **options)
    with pytest.raises(RecipeError) as error:
        trainer.fit(tiny_model(), datamodule=Prepared([]))
    return str(error.value)


def test_a_mesh_or_a_precision_that_does_not_fit(pair):
    for message in pair.run(refusal, 2, 4):
        assert "2 replicas x 4 shards = 8 ranks" in message
        assert "1 nodes x 2 devices" in message
    for message in pair.run(partial(refusal, precision="bf16-mixed"), 1, 2):
        assert "Make trainer.precision 32-true" in message


def test_groups_of_one_rank_are_left_to_fsdp2(pair):
    for message in pair.run(refusal, 2, 1):
        assert "FSDP1 needs shards to be at least 2" in message
        assert "components.sharding.HybridSharding, as recipes/trainer/fsdp_8xa100.yaml does" in message


def refusal_on_a_small_node():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 60, "SC_PAGE_SIZE": 4096}.get)
        return refusal(1, 2)


def test_a_node_that_cannot_hold_the_weights_of_all_its_ranks(pair):
    size = sum(4 * parameter.numel() for parameter in built_model().parameters()) / 2**30
    for message in pair.run(refusal_on_a_small_node):
        assert f"the 2 ranks of this node need {2 * size:.3g} GiB of memory, of 0.000229" in message
        assert "components.sharding.HybridSharding, as recipes/trainer/fsdp_8xa100.yaml does" in message
