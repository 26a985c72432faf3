"""Accumulation in a real Trainer: four micro-batches of one document are one micro-batch of four."""

import pytest
import torch
from lightning import Callback
from tiny import (
    ALL,
    DECODER_FROZEN,
    TOWER_FROZEN,
    Prepared,
    Record,
    assert_equal,
    built_model,
    gradients,
    tiny_document,
    tiny_model,
    tiny_trainer,
    weights,
)

from components.batch import pack

STEPS = [
    [tiny_document(3, (0,)), tiny_document(15, (5,)), tiny_document(5), tiny_document(9, (0, 4))],
    [tiny_document(30, (2,)), tiny_document(6, targets=0), tiny_document(4, (3,)), tiny_document(2)],
    [tiny_document(8), tiny_document(4, (1,), targets=0), tiny_document(21, (20,)), tiny_document(6, (0, 0))],
    [tiny_document(12), tiny_document(7), tiny_document(3), tiny_document(10)],
]


class Gradients(Callback):
    """Gradients as the optimizer's hooks see them, before clipping."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(gradients(pl_module))


def train(accumulate, rates, **options):
    size = 4 // accumulate
    batches = [pack(step[start : start + size]) for step in STEPS for start in range(0, 4, size)]
    model, record, seen = tiny_model(rates, weight_decay=0.1), Record(), Gradients()
    trainer = tiny_trainer(accumulate, callbacks=[record, seen], **options)
    trainer.fit(model, datamodule=Prepared(batches))
    assert trainer.global_step == len(STEPS)
    return weights(model), record, seen.steps


RATES = {"all": ALL, "tower_frozen": TOWER_FROZEN, "decoder_frozen": DECODER_FROZEN}
CASES = [(accumulate, rates, clip) for clip in (None, 0.3) for rates in RATES for accumulate in (4, 2)]
QUICK = [(4, "all", None), (4, "all", 0.3), (4, "tower_frozen", 0.3), (2, "decoder_frozen", 0.3)]


@pytest.mark.parametrize(
    ("accumulate", "rates", "clip"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_accumulated_equals_one_micro_batch(accumulate, rates, clip):
    expected, reference, their_gradients = train(1, RATES[rates], gradient_clip_val=clip)
    ours, record, our_gradients = train(accumulate, RATES[rates], gradient_clip_val=clip)
    assert record.series("train/loss") == pytest.approx(reference.series("train/loss"), rel=1e-5)
    assert record.series("norm/gradient") == pytest.approx(reference.series("norm/gradient"), rel=1e-5)
    assert_equal(our_gradients[0], their_gradients[0], 1e-5)
    # where gradients are nearly zero, AdamW turns their rounding errors into steps
    assert_equal(ours, expected, 1e-4)


def test_logged_values_are_those_of_the_first_step():
    """The loss per supervised token, and the norm before clipping, by hand."""
    model = built_model(ALL)
    batch = pack(STEPS[0])
    loss = model.loss_sum(batch) / len(batch.targets)
    loss.backward()
    norm = torch.cat([gradient.flatten() for gradient in gradients(model).values()]).norm()
    _, record, seen = train(4, ALL, gradient_clip_val=1e-3)
    assert record.steps[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record.steps[0]["norm/gradient"] == pytest.approx(norm.item(), rel=1e-5)
    assert_equal(seen[0], gradients(model))


def test_clipping_changes_the_gradients_and_not_the_logged_norm():
    """AdamW undoes the scale of one step, so that the second shows whether the first was clipped."""
    free, _, _ = train(4, ALL)
    clipped, record, _ = train(4, ALL, gradient_clip_val=0.3)
    assert min(record.series("norm/gradient")) > 0.3
    name = "decoder.lm.model.layers.0.mlp.up_proj.weight"
    assert (free[name] - clipped[name]).abs().max() > 1e-5
