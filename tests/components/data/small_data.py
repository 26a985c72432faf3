"""Data modules as a trainer sets them up, for small sources."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn

from components.batch import Batch, SampleFormat
from components.data import InstructionData, ShapesWorld, Source
from components.shapes_world import WORDS, Setting
from components.tokenizer import WordTokenizer

LAYOUT = SampleFormat(WordTokenizer(list(WORDS)), tokens_per_image=4, image_size=16, image_mean=(0.5, 0.4, 0.3))
TOKENIZER = WordTokenizer(list(WORDS)).build()
SHAPES = Setting(grid=2, max_objects=3, image_size=16)


def shapes(**options: Any) -> ShapesWorld:
    return ShapesWorld(SHAPES, **{"num_scenes": 300, "questions_per_scene": 2} | options)


def opened(
    sources: dict[str, Source],
    folder: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    accumulate: int = 1,
    step: int = 0,
    max_steps: int = 6,
    layout: SampleFormat = LAYOUT,
    **options: Any,
) -> InstructionData:
    """A data module after setup, with what it uses of a trainer."""
    data = InstructionData(sources, **{"template": "brief", "global_batch_size": 8, "num_workers": 0} | options)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        accumulate_grad_batches=accumulate, world_size=ranks, global_rank=rank, global_step=step, max_steps=max_steps,
        log_dir=str(folder),
        lightning_module=SimpleNamespace(sample_format=lambda: layout),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    data.setup("validate")
    return data


def assert_equal_batches(ours: Batch, theirs: Batch) -> None:
    for field in fields(Batch):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other, field.name


def end_workers(batches: Any) -> None:
    """End the workers of a loader's iterator now: the garbage collector waits seconds for each that still waits for work."""
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
