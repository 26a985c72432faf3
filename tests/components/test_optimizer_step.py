"""Optimizer steps that are not finite: skipped as a whole, while schedule and data advance."""

import pytest
import torch
from lightning import Callback
from tiny import ALL, Prepared, Record, tiny_document, tiny_model, tiny_trainer, weights

from components.batch import pack
from components.optimizer_step import OptimizerStep


class Poison(Callback):
    """Makes the loss or a gradient of some steps not finite; remembers weights and optimizer state after every step."""

    def __init__(self, steps, what, value):
        self.steps, self.what, self.value = steps, what, value
        self.weights, self.moments, self.skipped, self.rates = [], [], [], []

    def on_train_start(self, trainer, pl_module):
        loss_sum = pl_module.loss_sum

        def poisoned(batch):
            loss = loss_sum(batch)
            return loss * self.value if self.what == "loss" and trainer.global_step in self.steps else loss

        pl_module.loss_sum = poisoned

    def on_after_backward(self, trainer, pl_module):
        if self.what == "gradient" and trainer.global_step in self.steps:
            pl_module.projector.get_parameter(next(name for name, _ in pl_module.projector.named_parameters())).grad.mul_(
                self.value
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.weights.append(weights(pl_module))
            moments = trainer.optimizers[0].state.values()
            self.moments.append([value.clone() for state in moments for value in state.values()])
            self.skipped.append(pl_module.step.skipped)


def trained(poison, steps=4, accumulate=2):
    model, record = tiny_model(ALL), Record()
    batches = [pack([tiny_document(5 + number, (number % 3,), seed=number)]) for number in range(steps * accumulate)]
    trainer = tiny_trainer(accumulate, callbacks=[poison, record], gradient_clip_val=1.0)
    trainer.fit(model, datamodule=Prepared(batches))
    assert trainer.global_step == steps
    return record


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does(what, value):
    poison = Poison({1, 2}, what, value)
    record = trained(poison)
    assert poison.skipped == [False, True, True, False]
    first, second, third, fourth = poison.weights
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor) and torch.equal(third[name], tensor), name
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(poison.moments[2], poison.moments[0], strict=True))
    assert any(not torch.equal(fourth[name], tensor) for name, tensor in first.items())
    assert all(tensor.isfinite().all() for tensor in fourth.values())
    assert all(value < 100 for step in record.steps for value in step.values())  # what is skipped is not logged as a loss


def test_a_step_knows_what_it_is():
    fine = OptimizerStep(loss=6.0, targets=3.0, stop=0.0, report=0.0, norm=1.0)
    assert (fine.mean_loss, fine.finite, fine.skipped) == (2.0, True, False)
    empty = OptimizerStep(loss=0.0, targets=0.0, stop=0.0, report=0.0, norm=0.0)
    assert (empty.mean_loss, empty.finite, empty.skipped) == (0.0, True, True)
    assert OptimizerStep(float("nan"), 3.0, 0.0, 0.0, 1.0).skipped
    assert OptimizerStep(6.0, 3.0, 0.0, 0.0, float("inf")).skipped
