"""Training runs of the tiny model over any number of ranks, and twenty optimizer steps of documents to train on."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.strategies import Strategy
from tiny import LLAMA, Prepared, Record, TinyModel, fill, tiny_document, tiny_model, tiny_trainer, weights

from components.batch import Batch, Document, pack
from components.decoder import HuggingFaceDecoder, LoRA
from components.sharding import HybridSharding
from components.tokenizer import WordTokenizer
from components.vlm import LearningRates


def slow(*arguments: Any) -> Any:
    """Arguments of a case that shows what others show too."""
    return pytest.param(*arguments, marks=pytest.mark.slow)


Steps = Sequence[Sequence[Document]]
"""The documents of every optimizer step, in the order in which ranks and micro-batches get them."""


class AdaptedModel(TinyModel):
    """The tiny model with adapters that are the same wherever it is built, and not zero."""

    def adapt(self):
        super().adapt()
        fill(self, seed=1)


def adapted_model(rates, dropout=0.0, **overrides):
    decoder = HuggingFaceDecoder(LLAMA, WordTokenizer(), lora=LoRA(rank=3, alpha=3.0, dropout=dropout))
    model = tiny_model(rates)
    return AdaptedModel(model.vision_tower, model.projector, decoder, rates, **overrides)


class Run(NamedTuple):
    """What a rank knows of a run."""

    steps: list[dict[str, float]]
    """What was logged at every optimizer step, such as train/loss and norm/gradient."""
    validation: dict[str, float]
    """The losses of the last validation."""
    weights: dict[str, torch.Tensor]
    """The whole weights at the end."""

    def series(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def twenty_steps(documents: int = 8) -> Steps:
    """Documents of unequal lengths: every other one without a picture, some without targets, and steps without any picture."""
    generator = np.random.default_rng(20)
    steps = []
    for number in range(20):
        step = []
        for place in range(documents):
            words = int(generator.integers(3, 24))
            count = 0 if number % 7 == 3 else int(generator.choice([0, 0, 1, 2]))
            pictures = tuple(sorted(generator.integers(0, words, count).tolist()))
            targets = 0 if generator.random() < 0.1 else None
            step.append(tiny_document(words, pictures, 100 * number + place, targets))
        steps.append(step)
    return steps


CURVE_RATES = LearningRates(projector=2e-4, decoder=3e-4)
"""Rates of a loss curve, the tower frozen: AdamW at ten times these blows up the rounding of gradients that are almost zero."""

HELD_OUT: Steps = [
    [tiny_document(9, (1,), 1), tiny_document(5, (), 2)],
    [tiny_document(4, (), 3, targets=0), tiny_document(12, (3,), 4)],
    [tiny_document(7, (), 5), tiny_document(11, (), 6)],
    [tiny_document(6, (0, 2), 7), tiny_document(3, (1,), 8)],
]
"""Held-out documents of four ranks; the third has no picture."""


def rank_of(ranks: int) -> int:
    """The rank of this process in a run of `ranks`."""
    return int(os.environ["LOCAL_RANK"]) if ranks > 1 else 0


def deal(steps: Steps, ranks: int, rank: int, accumulate: int) -> list[Batch]:
    """The micro-batches of a rank: every rank gets as many documents of a step, and every micro-batch of a rank too."""
    batches = []
    for step in steps:
        mine = np.array_split(np.arange(len(step)), ranks)[rank]
        batches += [pack([step[number] for number in part]) for part in np.array_split(mine, accumulate)]
    return batches


def hybrid(replicas: int, shards: int, **options: Any) -> Callable[[], Strategy]:
    """A sharding that computes in float32, so that it can be compared with one process."""
    return partial(HybridSharding, replicas, shards, **{"param_dtype": "float32", **options})


def train(
    rates: LearningRates,
    steps: Steps,
    held_out: Steps = HELD_OUT,
    ranks: int = 1,
    strategy: Callable[[], Strategy | str] = lambda: "auto",
    accumulate: int = 1,
    clip: float | None = None,
    callbacks: Sequence[Callback] = (),
    make: Callable[..., Any] = tiny_model,
    read: Callable[[Any], dict[str, torch.Tensor]] = weights,
    ckpt_path: str | None = None,
    **options: Any,
) -> Run:
    """A training run with validations on this rank of `ranks`, of the model that `make` makes.

    Args:
        rates: Peak learning rates.
        steps: The documents of each optimizer step, of all ranks together.
        held_out: Documents of the validation, dealt to the ranks in whole rows.
        ranks: World size; 1 is the run that the others are compared with.
        strategy: Makes the strategy in the process that uses it.
        accumulate: Micro-batches of an optimizer step.
        clip: Norm that gradients are clipped to.
        callbacks: Besides the one that records the steps.
        make: Makes the model, before it is built.
        read: Whole weights of the trained model, which may be sharded.
        ckpt_path: What the run continues from.
        options: Of the Trainer.
    """
    rank = rank_of(ranks)
    rows = [pack(row) for row in held_out[rank * len(held_out) // ranks : (rank + 1) * len(held_out) // ranks]]
    model, record = make(rates, weight_decay=0.1), Record()
    options = {"limit_val_batches": 1.0, "val_check_interval": len(steps) // 2 * accumulate} | options
    options |= {"devices": ranks, "strategy": strategy(), "gradient_clip_val": clip}
    trainer = tiny_trainer(accumulate, callbacks=[record, *callbacks], **options)
    trainer.fit(model, datamodule=Prepared(deal(steps, ranks, rank, accumulate), {"other": rows}), ckpt_path=ckpt_path)
    assert trainer.global_step == len(steps)
    losses = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    return Run(record.steps, losses, read(model))
