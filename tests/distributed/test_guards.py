"""Guards on two processes: what happens to one of them ends, or spares, both in the same way."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback
from pair import fork
from small_recipe import write_recipe
from test_command import ROOT, sharded_trainer
from test_fsdp1 import FSDP1, whole_weights
from tiny import ALL, TOWER_FROZEN, Prepared, Record, assert_equal, tiny_document, tiny_model, tiny_trainer, weights
from training_runs import deal, hybrid, rank_of, slow

from callbacks.checkpoint import Checkpoint
from callbacks.guards import Guards, HangMinutes
from callbacks.guards.preemption import Preempted
from components.errors import RecipeError
from components.run_folder import RECIPE, STATE, checkpoint_folder, complete_checkpoints

STRATEGIES = {"ddp": lambda: "ddp", "fsdp": hybrid(1, 2), "fsdp1": FSDP1}
SECOND = 1 / 60

# optimizer steps of four documents: rank 0 has the first two, rank 1 the others
STEPS = [
    [tiny_document(3, (0,)), tiny_document(15, (5,)), tiny_document(5, (1,)), tiny_document(9, (0, 4))],
    [tiny_document(12), tiny_document(7), tiny_document(4, (3,)), tiny_document(20, (2,))],  # no picture on rank 0
    [tiny_document(8, (2,)), tiny_document(4, (1,)), tiny_document(21), tiny_document(6, (0, 0))],  # none in one micro-batch
    [tiny_document(6), tiny_document(9), tiny_document(3), tiny_document(10)],  # no picture anywhere
    [tiny_document(5, (1,)), tiny_document(8), tiny_document(11), tiny_document(7, (2,))],
]


class On(Callback):
    """Does something to one rank when a micro-batch of it begins."""

    def __init__(self, rank, micro_batches, what):
        self.rank, self.micro_batches, self.what = rank, micro_batches, what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and batch_idx in self.micro_batches:
            self.what(pl_module)


def train(strategy, folder, callbacks, state=None, ranks=2, steps=STEPS, held_out=(), rates=ALL, **options):
    """A run of two micro-batches a step on this rank; the model and what was logged."""
    model, record = tiny_model(rates, weight_decay=0.1), Record()
    options |= {"devices": ranks, "strategy": STRATEGIES[strategy]() if ranks > 1 else "auto"}
    options |= {"default_root_dir": folder, "enable_checkpointing": True, "gradient_clip_val": 0.3}
    trainer = tiny_trainer(2, callbacks=[*callbacks, Checkpoint(), record], **options)
    data = Prepared(
        deal(steps, ranks, rank_of(ranks), 2), {"other": deal(held_out, ranks, rank_of(ranks), 1)} if held_out else None
    )
    trainer.fit(model, datamodule=data, ckpt_path=state, weights_only=False)
    return model, record


def whole(strategy, model):
    return whole_weights(model) if strategy == "fsdp1" else weights(model)


@pytest.fixture
def run(tmp_path):
    return made(tmp_path)


def made(run):
    """A run folder with its recipe."""
    run.mkdir(exist_ok=True)
    (run / RECIPE).write_text("model: tiny\n")
    return run


# --- a signal


def told_to_end(strategy, folder):
    """The bits of a run without guards, of one with them, and of one that is told to end, on rank 1 alone, and goes on."""
    own = [Path(folder, name) for name in ("without", "with", "told")]
    bits = []
    for path, guards in zip(own[:2], ([], [Guards()]), strict=True):
        model, record = train(strategy, path, guards)
        bits.append((whole(strategy, model), record.steps))
    tell = On(1, {4}, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted) as exit_:
        train(strategy, own[2], [tell, Guards()])
    found = [path.name for path in complete_checkpoints(own[2])]
    model, record = train(strategy, own[2], [Guards()], str(checkpoint_folder(own[2], 3) / STATE))
    bits.append((whole(strategy, model), record.steps))
    return bits, exit_.value.code, found


@pytest.mark.parametrize("strategy", ["fsdp", slow("ddp"), slow("fsdp1")])
def test_one_rank_is_told_to_end(pair, strategy, run):
    for name in ("without", "with", "told"):
        made(run / name)
    for (without, with_guards, told), code, found in pair.run(told_to_end, strategy, str(run)):
        assert (code, found) == (143, ["step_00000003"])
        assert len(with_guards[1]) == len(STEPS)
        assert with_guards[1] == without[1]
        assert [step["train/loss"] for step in told[1]] == [step["train/loss"] for step in without[1][3:]]
        for name, tensor in without[0].items():
            assert torch.equal(with_guards[0][name], tensor) and torch.equal(told[0][name], tensor), name
    ends = [json.loads(line).get("end") for line in (run / "told" / "starts.jsonl").read_text().splitlines()]
    assert ends == [None, "told to end", None, "finished"]


# --- not finite


def poison_loss(model):
    loss_sum = type(model).loss_sum

    def once(batch):
        del model.loss_sum
        return loss_sum(model, batch) * math.inf

    model.loss_sum = once


def poison_gradient(model):
    """Of one parameter, on this rank's shard alone."""
    divided = type(model).on_after_backward

    def once():
        if not (model.trainer.fit_loop.batch_idx + 1) % 2:
            del model.on_after_backward
            next(p for p in model.decoder.parameters() if p.grad is not None and p.grad.numel()).grad.mul_(math.nan)
        divided(model)

    model.on_after_backward = once


def poisoned(strategy, folder, micro_batches, poison, most):
    guards = Guards(max_skipped_steps=most)
    try:
        model, record = train(strategy, folder, [On(1, micro_batches, poison), guards])
    except RecipeError as error:
        return str(error), guards.skipped_steps.count
    return whole(strategy, model), record.steps


@pytest.mark.parametrize(
    ("strategy", "poison"),
    [
        ("ddp", poison_loss),
        ("fsdp", poison_gradient),
        slow("fsdp", poison_loss),
        slow("fsdp1", poison_loss),
        slow("fsdp1", poison_gradient),
    ],
)
def test_one_rank_is_not_finite(pair, strategy, poison, run):
    # on one process, the same run with nothing to learn from in the second step
    expected, their_record = train(
        "one", made(run / "one"), [], ranks=1, steps=[STEPS[0], [tiny_document(6, (1,), targets=0)] * 4, *STEPS[2:]]
    )
    first, second = pair.run(poisoned, strategy, str(run), {3}, poison, 2)
    for weights_, steps in (first, second):
        assert [step.get("train/skipped_steps", 0) for step in steps] == [0, 1, 1, 1, 1]
        assert [step["train/loss"] for step in steps] == pytest.approx(their_record.series("train/loss"), rel=1e-5)
        assert_equal(weights_, weights(expected), 1e-4)
    assert all(torch.equal(tensor, second[0][name]) for name, tensor in first[0].items())
    lines = [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2]
    names = [[name for batch in rank for name in batch["samples"]] for rank in lines[0]["ranks"]]
    assert names == [[document.sample_id for document in part] for part in (STEPS[1][:2], STEPS[1][2:])]
    finite = [isinstance(batch["loss"], float) for rank in lines[0]["ranks"] for batch in rank]
    assert finite == ([True] * 4 if poison is poison_gradient else [True, True, True, False])


@pytest.mark.parametrize("strategy", ["fsdp", slow("ddp")])
def test_one_rank_is_not_finite_again_and_again(pair, strategy, run):
    for message, count in pair.run(poisoned, strategy, str(run), {1, 2, 5}, poison_loss, 3):
        assert "The last 3 optimizer steps" in message and "skipped_steps.jsonl" in message
        assert count == 3


# --- a hang


def hangs(strategy, folder, guards, micro_batch, seconds):
    train(strategy, folder, [guards, On(1, {micro_batch}, lambda model: time.sleep(seconds))])


def exit_codes(function, *arguments, seconds=60):
    """How two processes of their own end."""
    processes = fork(function, [arguments] * 2)
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.mark.parametrize("strategy", ["fsdp", slow("ddp")])
def test_one_rank_sleeps(strategy, run):
    guards = Guards(hang_minutes=HangMinutes(step=3 * SECOND))
    assert exit_codes(hangs, strategy, str(run), guards, 2, 600) == [75, 75]  # before any step could raise the limit
    waits, sleeps = ((run / f"hang_rank_{rank}.txt").read_text() for rank in range(2))
    for rank, text in enumerate((waits, sleeps)):
        assert f"rank {rank}: no progress in phase 'step'" in text
        assert f"Samples under way: {STEPS[1][2 * rank].sample_id}" in text
        assert "training_epoch_loop.py" in text  # where it is, though it is in a collective, which is C++
    assert "in <lambda>" in sleeps and "in <lambda>" not in waits
    last = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    assert last["failed"] == "no progress in phase 'step'"


class Late(Callback):
    """One rank is late in a validation."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_rank == 1:
            time.sleep(3)


def late(folder, told):
    guards = Guards(step_timeout_minutes=2 * SECOND)
    sleep = On(1, {8}, lambda model: time.sleep(6))
    options = {"limit_val_batches": 1.0, "val_check_interval": 8, "num_sanity_val_steps": 0, "held_out": STEPS[:1]}
    begin = 0.0

    class Clock(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            nonlocal begin
            begin = time.monotonic()

    try:
        train("fsdp", folder, [Clock(), sleep, guards, Late()], **options)
    except RuntimeError as error:
        Path(told, str(rank_of(2))).write_text(json.dumps([guards.samples.under_way, time.monotonic() - begin, str(error)]))
        raise


@pytest.mark.slow
def test_collectives_are_awaited_for_long_in_a_validation_and_for_short_in_a_step(run, tmp_path_factory):
    told = tmp_path_factory.mktemp("told")
    assert exit_codes(late, str(run), str(told)) == [1, 1]
    samples, seconds, error = json.loads((told / "0").read_text())
    assert samples == [STEPS[4][0].sample_id]  # after the validation at step 4, in which rank 1 was late
    assert 2 <= seconds < 6 and "Timed out waiting 2000ms" in error


# --- slow ranks, and what guards cost


def stragglers(folder):
    late = On(1, set(range(2, 10)), lambda model: time.sleep(0.3))
    return train("fsdp", folder, [late, Guards(straggler_every_n_steps=2)])[1].steps


def test_a_slow_rank_is_named(pair, run):
    for steps in pair.run(stragglers, str(run)):
        assert steps[-1]["time/step_max_over_median"] > 1.5
        assert 0.15 < steps[-1]["time/data_wait"] < 1  # the mean of nothing and of two times 0.3 s
    entries = [json.loads(line) for line in (run / "stragglers.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert {entry["rank"] for entry in entries} == {1}
    assert all(entry["data_wait"] > 0.25 and entry["median_data_wait"] < 0.2 for entry in entries)


def counting(real, counts):
    def counted(*arguments, **options):
        if counts:
            counts[-1] += 1
        return real(*arguments, **options)

    return counted


def exchanges(folder, guarded):
    """How often this rank talks to others in each optimizer step."""
    counts = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx % 2 == 0:
                counts.append(0)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("broadcast", "all_reduce", "barrier", "all_gather", "all_gather_object", "broadcast_object_list"):
            patch.setattr(torch.distributed, name, counting(getattr(torch.distributed, name), counts))
        train("ddp", folder, [Count(), *([Guards()] if guarded else [])], rates=TOWER_FROZEN)
    return counts[1:-1]


def test_guards_talk_less_than_lightning_does_without_them(pair, run):
    guarded, alone = (pair.run(exchanges, str(made(run / name)), name == "guarded") for name in ("guarded", "alone"))
    for with_guards, without in zip(guarded, alone, strict=True):
        assert [ours + 2 for ours in with_guards] == without  # Lightning's broadcast before each of two micro-batches


@pytest.mark.slow
def test_the_command_leaves_no_process_of_its_own_and_the_code_of_a_run_told_to_end(tmp_path):
    trainer = sharded_trainer() | {"callbacks": [{"class_path": "tests.small_recipe.Diary"}], "enable_progress_bar": False}
    recipe = write_recipe(tmp_path / "told.yaml", trainer=trainer, data={"global_batch_size": 8}, max_steps=200)
    environment = {**os.environ, "PYTHONWARNINGS": "", "GLOO_SOCKET_IFNAME": "lo", "PAUSE": "0.1"}
    command = [sys.executable, str(ROOT / "main.py"), "fit", "--config", str(recipe)]
    with (tmp_path / "output").open("w+") as output:
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            until = time.monotonic() + 90
            while not complete_checkpoints(tmp_path / "runs/told") and process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)  # to the first rank alone
            try:
                process.wait(60)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                    pytest.fail("a process was left")
        output.seek(0)
        text = output.read()
    assert process.returncode == 143, text
    step = int(complete_checkpoints(tmp_path / "runs/told")[-1].name.removeprefix("step_"))
    assert f"runs/told was told to end at step {step} and is saved at step {step}" in text
