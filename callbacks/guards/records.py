"""What guards write down: a line of JSON for each event, with the samples that the ranks had before them."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from components.batch import Batch


class Samples:
    """Micro-batches in, the samples and losses of the optimizer step under way and of the one before out."""

    def __init__(self) -> None:
        self.now: list[tuple[torch.Tensor, int, list[str]]] = []
        self.before: list[tuple[torch.Tensor, int, list[str]]] = []
        self.under_way: list[str] = []

    def take(self, batch: Batch, loss: torch.Tensor) -> None:
        """A micro-batch has been computed; its loss stays on the device."""
        self.now.append((loss, len(batch.targets), batch.sample_ids))

    def turn(self) -> None:
        """The optimizer step is over."""
        self.now, self.before = [], self.now


def of_all_ranks(trainer: Trainer, micro_batches: list[tuple[torch.Tensor, int, list[str]]]) -> list[Any]:
    """The micro-batches of every rank, with the mean loss and the samples of each. Called on all ranks; empty but on the first."""
    mine = [
        {"loss": number(loss.item() / trainer.world_size / max(1, targets)), "samples": samples}
        for loss, targets, samples in micro_batches
    ]
    if trainer.world_size == 1:
        return [mine]
    gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(mine, gathered)
    return gathered or []


def number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)


def append(file: Path, entry: dict[str, Any]) -> None:
    """One more line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")
