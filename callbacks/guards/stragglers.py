"""Ranks that hold up the others: each step takes as long as the slowest of them, and all of them seem to take as long.

A rank's own time is known where it waits for no other: while it waits for data, and while it does the same few matrix products as
every other rank. From both follows how long a step would take if all ranks were like this one.
"""

import socket
import time
from pathlib import Path
from statistics import fmean, median_low
from typing import Any

import torch
from lightning import Trainer
from tqdm import tqdm

from callbacks.guards.records import append

FILE = "stragglers.jsonl"
_TRIALS, _PRODUCTS = 3, 8


class Stragglers:
    """Times of this rank in; `time/data_wait`, `time/step_max_over_median` and a line in `stragglers.jsonl` out.

    Args:
        every_n_steps: Optimizer steps that each look averages over.
        ratio: Step time of the slowest rank over that of the median rank, above which it is named.
    """

    def __init__(self, every_n_steps: int, ratio: float) -> None:
        self.every_n_steps = every_n_steps
        self.ratio = ratio
        self.steps: list[float] = []
        self.data_wait = 0.0
        self.named: int | None = None

    def meet(self, trainer: Trainer) -> None:
        """Learn where the ranks are. Called on all ranks."""
        self.hosts = [socket.gethostname()] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(self.hosts, socket.gethostname())

    def look(self, trainer: Trainer, device: torch.device, run: Path) -> dict[str, float]:
        """Compare the ranks after a step at which it is due. Called on all ranks; what is to be logged out."""
        if not self.steps or trainer.global_step % self.every_n_steps:
            return {}
        mine = [fmean(self.steps), self.data_wait / len(self.steps), seconds_of_work(device) if trainer.world_size > 1 else 1.0]
        self.steps, self.data_wait = [], 0.0
        local = torch.tensor(mine, dtype=torch.float64, device=device)
        steps, waits, work = trainer.strategy.all_gather(local).reshape(-1, 3).T.tolist()  # type: ignore[union-attr]
        logged = {"time/data_wait": fmean(waits)}
        if trainer.world_size > 1:
            alone = own_step_times(median_low(steps), waits, work)
            logged["time/step_max_over_median"] = max(alone) / median_low(alone)
            if trainer.is_global_zero:
                self._name(trainer, alone, waits, work, run)
        return logged

    def _name(self, trainer: Trainer, alone: list[float], waits: list[float], work: list[float], run: Path) -> None:
        slowest = alone.index(max(alone))
        ratio = alone[slowest] / median_low(alone)
        if ratio <= self.ratio:
            self.named = None
            return
        entry: dict[str, Any] = {
            "step": trainer.global_step,
            "rank": slowest,
            "host": self.hosts[slowest],
            "ratio": round(ratio, 3),
            "data_wait": waits[slowest],
            "median_data_wait": median_low(waits),
            "work": work[slowest],
            "median_work": median_low(work),
        }
        append(run / FILE, entry)
        if self.named != slowest:  # once, however long it stays the slowest
            tqdm.write(
                f"step {trainer.global_step}: rank {slowest} on {entry['host']} holds up the others: a step takes {ratio:.2f} "
                f"times as long. It waits {waits[slowest]:.2f} s for the data of a step (median {median_low(waits):.2f}) and works "
                f"{work[slowest] * 1e3:.1f} ms for what takes {median_low(work) * 1e3:.1f}. {run / FILE}"
            )
            self.named = slowest


def own_step_times(step: float, waits: list[float], work: list[float]) -> list[float]:
    """Seconds that a step would take if all ranks were like each of them; with them all it takes `step`, as long as the slowest."""
    computing = max(0.0, step - max(waits))
    return [wait + computing * ours / max(work) for wait, ours in zip(waits, work, strict=True)]


def seconds_of_work(device: torch.device) -> float:
    """How long a few matrix products take on this rank alone: the best of several trials, since others may disturb them."""
    side, dtype = (2048, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    product = torch.empty_like(matrix)
    best = float("inf")
    for _ in range(_TRIALS):
        _wait_for(device)
        begin = time.perf_counter()
        for _ in range(_PRODUCTS):
            torch.mm(matrix, matrix, out=product)
        _wait_for(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
