"""The learning-rate schedule: transformers' cosine, from the number of the optimizer step alone."""

import math

import pytest
import torch
from tiny import ALL, DECODER_FROZEN, TOWER_FROZEN, Prepared, Record, tiny_batch, tiny_model, tiny_trainer
from transformers import get_cosine_schedule_with_warmup

from callbacks.checkpoint import Checkpoint
from callbacks.warmup import Warmup
from components.errors import RecipeError
from components.run_folder import RECIPE, STATE, checkpoint_folder


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (1, 10), (3, 37), (30, 100), (9, 10)])
def test_factor_equals_transformers(warmup, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        assert Warmup(steps=warmup).factor(step, steps) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_floor():
    schedule = Warmup(steps=4, floor=0.1)
    factors = [schedule.factor(step, 24) for step in range(25)]
    assert factors[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert factors[14] == pytest.approx(0.55)  # half of the cosine, half way from the peak to the floor
    assert factors[24] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert [Warmup(steps=0, floor=1.0).factor(step, 5) for step in range(5)] == [1.0] * 5


@pytest.mark.parametrize(
    ("fraction", "steps", "expected"), [(0.03, 5197, 156), (0.03, 100, 3), (0.03, 101, 4), (0.0, 10, 0), (0.5, 3, 2)]
)
def test_fraction_is_rounded_up(fraction, steps, expected):
    schedule = Warmup(fraction=fraction)
    assert schedule.num_steps(steps) == expected
    for step in range(expected):
        assert schedule.factor(step, steps) == step / expected
    assert schedule.factor(expected, steps) == 1.0


@pytest.mark.parametrize(
    "arguments",
    [{}, {"steps": 1, "fraction": 0.1}, {"steps": -1}, {"fraction": 1.5}, {"fraction": -0.1}, {"steps": 1, "floor": 2.0}],
)
def test_arguments_that_contradict(arguments):
    with pytest.raises(RecipeError, match="warmup: "):
        Warmup(**arguments)


@pytest.mark.parametrize("arguments", [{"steps": 3}, {"steps": 100}, {"fraction": 0.9}])
def test_warmup_as_long_as_the_run(arguments):
    trainer = tiny_trainer(steps=3, callbacks=[Warmup(**arguments)])
    with pytest.raises(RecipeError, match=r"warmup takes (3|100) steps, but the run has trainer.max_steps = 3"):
        trainer.fit(tiny_model(), datamodule=Prepared([tiny_batch()] * 3))


class Rates(Record):
    """The rate of every parameter group at each optimizer step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass


def expected_rates(schedule, rates, steps):
    peaks = {name: peak for name, peak in vars(rates).items() if peak is not None}
    return [
        {name + suffix: peak * schedule.factor(step, steps) for name, peak in peaks.items() for suffix in ("", "_no_decay")}
        for step in range(steps)
    ]


@pytest.mark.parametrize("rates", [ALL, DECODER_FROZEN], ids=["all", "decoder_frozen"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_group_has_its_own_peak(rates, accumulate):
    schedule, seen, record = Warmup(steps=2, floor=0.2), Rates(), Record()
    trainer = tiny_trainer(accumulate, steps=6, callbacks=[schedule, seen, record])
    trainer.fit(tiny_model(rates), datamodule=Prepared([tiny_batch()] * 6 * accumulate))
    named = expected_rates(schedule, rates, 6)
    for step, expected in zip(seen.steps, named, strict=True):
        # the decoder has biases nowhere, but norms
        assert step == pytest.approx({name: rate for name, rate in expected.items() if name in step})
        assert {name.removesuffix("_no_decay") for name in step} == {name for name, rate in vars(rates).items() if rate}
    assert record.series("lr/projector") == pytest.approx([step["projector"] for step in named])


def test_first_step_of_warmup_changes_nothing():
    model = tiny_model()
    start = None

    class Start(Rates):
        def on_train_start(self, trainer, pl_module):
            nonlocal start
            start = [parameter.detach().clone() for parameter in pl_module.parameters()]

    trainer = tiny_trainer(callbacks=[Warmup(steps=1), Start()], steps=2, limit_train_batches=1)
    trainer.fit(model, datamodule=Prepared([tiny_batch()] * 2))
    assert trainer.global_step == 1
    assert all(torch.equal(before, after) for before, after in zip(start, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resumed_run_has_the_same_rates(tmp_path):
    """Whatever rates the checkpoint holds: they follow from the step alone."""
    (tmp_path / RECIPE).write_text("model: tiny\n")
    batches = [tiny_batch(seed) for seed in range(12)]
    whole = Rates()
    callbacks = [Warmup(fraction=0.5), whole, Checkpoint(every_n_steps=2, keep=9)]
    trainer = tiny_trainer(2, 6, callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(tiny_model(TOWER_FROZEN), datamodule=Prepared(batches))

    for step in (2, 4):  # within the warmup and within the cosine
        rest = Rates()
        trainer = tiny_trainer(2, 6, [Warmup(fraction=0.5), rest])
        state = checkpoint_folder(tmp_path, step) / STATE
        trainer.fit(tiny_model(TOWER_FROZEN), datamodule=Prepared(batches), ckpt_path=state, weights_only=True)
        assert rest.steps == whole.steps[step:]
    assert len(whole.steps) == 6
    assert math.isclose(max(step["decoder"] for step in whole.steps), TOWER_FROZEN.decoder)
