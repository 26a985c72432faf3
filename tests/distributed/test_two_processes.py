"""Two processes compute what one does: DDP and FSDP2, clipping, accumulation, ranks without pictures, adapters, checkpoints,
generation, the causality probe."""

import functools
import io
import os
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import pytest
import torch
import training_runs as runs
from lightning import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import (
    ALL,
    DECODER_FROZEN,
    TOWER_FROZEN,
    Numbers,
    Prepared,
    assert_equal,
    built_model,
    tiny_document,
    tiny_documents,
    tiny_model,
    tiny_trainer,
    weights,
)
from torch.distributed.tensor import DTensor
from training_runs import adapted_model, deal, slow

from callbacks.checkpoint import Checkpoint
from callbacks.overview import Overview
from components.causality import prove_causal
from components.checkpoint_files import load_weights
from components.decoder import attention
from components.errors import RecipeError
from components.run_folder import RECIPE, checkpoint_folder
from components.sharding import HybridSharding

RATES = {"all": ALL, "tower_frozen": TOWER_FROZEN, "decoder_frozen": DECODER_FROZEN}
FSDP = {"replicas": 1, "shards": 2, "param_dtype": "float32"}
HYBRID = {"replicas": 2, "shards": 1, "param_dtype": "float32"}
STRATEGIES = {"ddp": None, "fsdp": FSDP, "hybrid": HYBRID}

# optimizer steps of four documents: rank 0 has the first two, rank 1 the others
STEPS = [
    [tiny_document(3, (0,)), tiny_document(15, (5,)), tiny_document(5, (1,)), tiny_document(9, (0, 4))],
    [tiny_document(12), tiny_document(7), tiny_document(4, (3,)), tiny_document(20, (2,))],  # no picture on rank 0
    [tiny_document(6, (1,), targets=0) for _ in range(4)],  # nothing to learn from
    [tiny_document(8, (2,)), tiny_document(4, (1,)), tiny_document(21), tiny_document(6, (0, 0), targets=0)],
    [tiny_document(6), tiny_document(9), tiny_document(3), tiny_document(10)],  # no picture anywhere
]
HELD_OUT = [[tiny_document(9, (1,)), tiny_document(5)], [tiny_document(4, targets=0), tiny_document(12, (3,))]]


def micro_batches(accumulate, ranks, rank):
    return deal(STEPS, ranks, rank, accumulate)


def train(rates, ranks, strategy, accumulate, clip, callbacks=(), make=tiny_model, **options):
    """A run over the steps above with validation, by DDP or by a sharding."""
    named = {"strategy": (lambda: "ddp") if strategy is None else partial(HybridSharding, **strategy)} if ranks == 2 else {}
    options |= {"accumulate": accumulate, "clip": clip, "callbacks": callbacks, "make": make}
    run = runs.train(rates, STEPS, HELD_OUT, ranks, **named, **options)
    return run.weights, run.steps, run.validation


@functools.cache
def of_one_process(rates, clip, make=tiny_model):
    return train(RATES[rates], 1, None, 1, clip, make=make)


OFTEN = {  # each strategy, each kind of frozen part, with accumulation and clipping
    ("ddp", "all", 2, 0.3),
    ("ddp", "tower_frozen", 2, 0.3),
    ("fsdp", "all", 2, 0.3),
    ("fsdp", "decoder_frozen", 2, 0.3),
    ("hybrid", "all", 2, 0.3),
}
CASES = [(strategy, rates, *options) for rates in RATES for options in ((1, None), (2, 0.3)) for strategy in STRATEGIES]


@pytest.mark.parametrize(("strategy", "rates", "accumulate", "clip"), [case if case in OFTEN else slow(*case) for case in CASES])
def test_two_processes_equal_one(pair, strategy, rates, accumulate, clip):
    expected, their_steps, their_losses = of_one_process(rates, clip)
    results = pair.run(train, RATES[rates], 2, STRATEGIES[strategy], accumulate, clip)
    for ours, steps, losses in results:
        for name in ("train/loss", "norm/gradient"):
            assert [step[name] for step in steps] == pytest.approx([step[name] for step in their_steps], rel=1e-5)
        assert_equal(ours, expected, 1e-4)
        assert losses == pytest.approx(their_losses, rel=1e-5)
    assert set(their_losses) == {"val/loss/other"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", slow("hybrid")])
def test_two_processes_with_adapters_equal_one(pair, strategy):
    expected, their_steps, their_losses = of_one_process("tower_frozen", 0.3, adapted_model)
    arguments = (TOWER_FROZEN, 2, STRATEGIES[strategy], 2, 0.3, (), adapted_model)
    start = adapted_model(TOWER_FROZEN)
    start.configure_model()
    trained = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    for ours, steps, losses in pair.run(train, *arguments):
        assert [step["norm/gradient"] for step in steps] == pytest.approx([s["norm/gradient"] for s in their_steps], rel=1e-5)
        assert_equal(ours, expected, 1e-4)
        assert losses == pytest.approx(their_losses, rel=1e-5)
        assert {name for name, before in weights(start).items() if not torch.equal(before, ours[name])} == trained


class Probe(Callback):
    """What the causality probe says of this rank's live model, and of one that is not causal."""

    def on_train_start(self, trainer, pl_module):
        before, modes = weights(pl_module), [module.training for module in pl_module.modules()]
        self.difference = prove_causal(pl_module)
        self.kept = all(torch.equal(value, before[name]) for name, value in weights(pl_module).items())
        self.kept &= modes == [module.training for module in pl_module.modules()]
        self.sharded = all(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
        attention._per_document, real = without_a_mask, attention._per_document
        try:
            prove_causal(pl_module)
        except RuntimeError as error:
            self.message = str(error)
        finally:
            attention._per_document = real


def without_a_mask(query, key, value, cumulative_lengths, scaling, sliding_window):
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def probed(strategy, param_dtype):
    probe = Probe()
    train(ALL, 2, strategy and {**strategy, "param_dtype": param_dtype}, 2, None, [probe], adapted_model)
    return probe.difference, probe.kept, probe.sharded, probe.message


@pytest.mark.parametrize(
    ("strategy", "param_dtype"),
    [
        ("ddp", "float32"),
        ("fsdp", "bfloat16"),
        slow("fsdp", "float32"),
        *(slow("hybrid", dtype) for dtype in ("float32", "bfloat16")),
    ],
)
def test_the_causality_probe(pair, strategy, param_dtype):
    for difference, kept, sharded, message in pair.run(probed, STRATEGIES[strategy], param_dtype):
        assert (difference, kept, sharded) == (0, True, strategy != "ddp")
        assert "not causal" in message


def test_bfloat16_computation_with_float32_shards(pair):
    _, expected, _ = train(TOWER_FROZEN, 1, None, 1, 1.0)
    for ours, steps, losses in pair.run(train, TOWER_FROZEN, 2, {**FSDP, "param_dtype": "bfloat16"}, 2, 1.0):
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in ours.values())
        difference = [abs(step["train/loss"] - theirs["train/loss"]) for step, theirs in zip(steps, expected, strict=True)]
        assert 0 < max(difference) < 0.1
        assert all(0 < loss < 10 for loss in losses.values())


def sharded_run(folder, strategy):
    checkpoint = Checkpoint(every_n_steps=2, keep=3)
    return train(TOWER_FROZEN, 2, strategy, 2, None, [checkpoint], enable_checkpointing=True, default_root_dir=folder)[0]


def resumed_run(folder, state):
    rank = int(os.environ["LOCAL_RANK"])
    model = tiny_model(TOWER_FROZEN, weight_decay=0.1)
    trainer = tiny_trainer(2, devices=2, strategy=HybridSharding(**FSDP), default_root_dir=folder)
    trainer.fit(model, datamodule=Prepared(micro_batches(2, 2, rank)), ckpt_path=state)
    assert trainer.global_step == len(STEPS)
    return weights(model)


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    """A run folder with the checkpoints of a sharded run, and the weights that the run ended with."""
    return saved_by(pair, tmp_path_factory.mktemp("saved"), FSDP)


def saved_by(pair, folder, strategy):
    (folder / RECIPE).write_text("model: tiny\n")
    return folder, pair.run(sharded_run, str(folder), strategy)[0]


def test_sharded_checkpoint_loads_into_a_whole_model_and_resumes(pair, saved):
    folder, expected = saved
    last = checkpoint_folder(folder, len(STEPS))
    assert (last / "state").is_dir()
    model = built_model()
    load_weights(model, last, "--ckpt")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(model).items())

    halfway = checkpoint_folder(folder, 2) / "state"
    for resumed in pair.run(resumed_run, str(folder), str(halfway)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


def second_stage(first_stage):
    rank = int(os.environ["LOCAL_RANK"])
    model = tiny_model(ALL, initial_weights=first_stage)
    start = Weights()
    trainer = tiny_trainer(callbacks=[start], devices=2, strategy=HybridSharding(**FSDP))
    trainer.fit(model, datamodule=Prepared(micro_batches(1, 2, rank)))
    return start.weights


class Weights(Callback):
    """Weights before the first step."""

    def on_train_start(self, trainer, pl_module):
        self.weights = weights(pl_module)


@pytest.mark.parametrize("strategy", [slow("ddp"), "fsdp"])
def test_second_stage_starts_from_the_weights_of_the_first(pair, saved, tmp_path, strategy):
    folder, expected = saved if strategy == "fsdp" else saved_by(pair, tmp_path, STRATEGIES[strategy])
    for start in pair.run(second_stage, str(folder)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in start.items())


class Answers(Callback):
    """Answers before the first training step, after every one, and at the end."""

    def __init__(self, prompts, end):
        self.prompts, self.end, self.answers = prompts, end, []

    def on_train_start(self, trainer, pl_module):
        pl_module.tokenizer = Numbers()
        self._ask(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._ask(pl_module)

    def _ask(self, model):
        modes = {module: module.training for module in model.modules()}
        model.eval()
        self.answers.append(model.generate(self.prompts, max_new_tokens=6, end_token_id=self.end))
        for module, mode in modes.items():
            module.training = mode


SHARES = [tiny_documents(), [tiny_document(9), tiny_document(3)]]  # no picture on rank 1
ABOUT_ONE = [replace(tiny_document(words, (0,)), pixels=tiny_document(5, (0,)).pixels) for words in (5, 2, 7, 3)]
ASKED = {"pictures of their own": SHARES, "one picture": [ABOUT_ONE, SHARES[1]]}

WHOLE = {**FSDP, "replicate_frozen": True, "activation_checkpointing": "full", "reshard_after_forward": False}


def answers(strategy, shares=SHARES, end=2, rates=TOWER_FROZEN):
    """What this rank's share of the prompts is answered with along a run."""
    rank = 0 if strategy is None else int(os.environ["LOCAL_RANK"])
    asked = Answers(shares[rank] if strategy else [*shares[0], *shares[1]], end)
    options = {"devices": 2, "strategy": HybridSharding(**strategy)} if strategy else {}
    data = Prepared(micro_batches(1, 2 if strategy else 1, rank))
    tiny_trainer(callbacks=[asked], **options).fit(tiny_model(rates), datamodule=data)
    return asked.answers


@functools.cache
def answers_of_one_process(rates, asked):
    return answers(None, ASKED[asked], rates=RATES[rates])


FIRST, SECOND = ASKED
GENERATIONS = [
    (FSDP, "tower_frozen", FIRST),
    (HYBRID, "tower_frozen", SECOND),
    (WHOLE, "decoder_frozen", FIRST),
    slow(FSDP, "tower_frozen", SECOND),
    slow(HYBRID, "tower_frozen", FIRST),
    slow(WHOLE, "decoder_frozen", SECOND),
    *(slow(WHOLE, "tower_frozen", asked) for asked in ASKED),
    *(slow(strategy, "decoder_frozen", asked) for strategy in (FSDP, HYBRID) for asked in ASKED),
]


@pytest.mark.parametrize(("strategy", "rates", "asked"), GENERATIONS)
def test_generation_before_and_after_training_steps(pair, strategy, rates, asked):
    first, second = pair.run(answers, strategy, ASKED[asked], 2, RATES[rates])
    assert [ours + theirs for ours, theirs in zip(first, second, strict=True)] == answers_of_one_process(rates, asked)


EARLY = [(0, FSDP, "tower_frozen"), slow(1, FSDP, "tower_frozen"), slow(0, WHOLE, "decoder_frozen")]


@pytest.mark.parametrize(("early", "strategy", "rates"), EARLY)
def test_a_rank_whose_answers_end_early_takes_part_until_the_other_is_done(pair, early, strategy, rates):
    shares = [[tiny_document(9)], tiny_documents()[:2]]
    shares = shares[::-1] if early else shares
    before = answers(None, shares, rates=RATES[rates])[0]
    short, long = (before[-1], before[:-1]) if early else (before[0], before[1:])
    end = short.split()[1]
    assert end not in " ".join(long).split() and all(len(answer.split()) == 6 for answer in long)
    expected = answers(None, shares, int(end), RATES[rates])
    assert len(expected[0][-1 if early else 0].split()) <= 1
    first, second = pair.run(answers, strategy, shares, int(end), RATES[rates])
    assert [ours + theirs for ours, theirs in zip(first, second, strict=True)] == expected


def first_lines(**options):
    """What a sharded run on this rank prints before its first step."""
    rank, printed = int(os.environ["LOCAL_RANK"]), io.StringIO()
    trainer = tiny_trainer(callbacks=[Overview()], devices=2, strategy=HybridSharding(replicas=1, shards=2, **options))
    with redirect_stdout(printed):
        trainer.fit(tiny_model(), datamodule=Prepared(micro_batches(1, 2, rank)))
    return printed.getvalue()


def test_overview_of_a_sharded_run(pair):
    first, second = pair.run(first_lines)
    assert "compute bfloat16, storage float32, reduce float32; 2 ranks on cpu" in first.splitlines()
    assert "layout 1 replicas x 2 shards, activation checkpointing none" in first.splitlines()
    assert second == ""


def refusal(strategy):
    try:
        tiny_trainer(devices=2, strategy=strategy).fit(tiny_model(), datamodule=Prepared([]))
    except RecipeError as error:
        return str(error)


def wrong_mesh():
    return refusal(HybridSharding(replicas=2, shards=4))


def other_strategy():
    return refusal(ModelParallelStrategy())


def test_a_strategy_that_cannot_shard_the_model(pair):
    for message in pair.run(other_strategy):
        assert "ModelParallelStrategy" in message
        assert "components.sharding.HybridSharding" in message


def test_mesh_that_does_not_fit_the_ranks(pair):
    for message in pair.run(wrong_mesh):
        assert "2 replicas x 4 shards = 8 ranks" in message
        assert "1 nodes x 2 devices" in message
