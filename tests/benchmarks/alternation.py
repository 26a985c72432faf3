"""Blocks of a run's own steps and blocks of other steps in turn: what the clock and the memory of each say."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from components.batch import Batch

GIB = 2**30
OURS = "ours"


class Ready(LightningDataModule):
    """Packed micro-batches, ready made, from page-locked memory where there is a GPU."""

    def __init__(self, batches: list[Batch], pinned: bool) -> None:
        super().__init__()
        self.batches, self.pinned = batches, pinned
        self.validation_names: list[str] = []

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None, pin_memory=self.pinned)  # type: ignore[arg-type]


@dataclass
class Timing:
    """Of each block the seconds of a step; the most memory that tensors took in a block, in GiB."""

    seconds: list[float] = field(default_factory=list)
    gib: float = 0.0


class Alternate(Callback):
    """Times blocks of the Trainer's own steps and, after each, a block of every peer, in this order.

    Args:
        phases: Names of workloads; the run goes through them one after another, with equally many steps.
        peers: Functions that run an optimizer step, given the workload and the number of the step in it, by name.
        warmup: Steps of a phase before its first block, of the run and of every peer.
        blocks: Blocks of a phase.
        steps: Steps of a block.
        accumulation: Micro-batches of an optimizer step.
        at_start: Called before the first step of each phase.
        profiled: Whether each phase ends with one more step of the run, which is profiled and not timed.
    """

    def __init__(
        self,
        phases: Sequence[str],
        peers: dict[str, Callable[[str, int], None]],
        warmup: int,
        blocks: int,
        steps: int,
        accumulation: int,
        at_start: Callable[[str], None],
        profiled: bool = False,
    ) -> None:
        self.phases, self.peers, self.warmup, self.blocks, self.steps = phases, peers, warmup, blocks, steps
        self.accumulation, self.at_start, self.profiled = accumulation, at_start, profiled
        self.timings = {(phase, name): Timing() for phase in phases for name in (OURS, *peers)}
        self.profiles: dict[str, profile] = {}
        self.graphs: list[int] = []

    @property
    def steps_of_phase(self) -> int:
        """Steps of the run in a phase."""
        return self.warmup + self.blocks * self.steps + self.profiled

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        phase, step = self._place(batch_idx)
        if batch_idx % self.accumulation:
            return
        if step == 0:
            self.at_start(phase)
        if self.profiled and step == self.steps_of_phase - 1:
            synchronize(pl_module.device)
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (pl_module.device.type == "cuda")
            self.profiles[phase] = profile(activities=kinds)
            self.profiles[phase].__enter__()
        elif step >= self.warmup and (step - self.warmup) % self.steps == 0:
            self.started = self._start(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        phase, step = self._place(batch_idx)
        device = pl_module.device
        if (batch_idx + 1) % self.accumulation:
            return
        if self.profiled and step == self.steps_of_phase - 1:
            synchronize(device)
            self.profiles[phase].__exit__(None, None, None)
        elif step == self.warmup - 1:
            for peer in self.peers.values():
                for number in range(self.warmup):
                    peer(phase, number)
        elif step >= self.warmup and (step - self.warmup + 1) % self.steps == 0:
            self._stop(self.timings[phase, OURS], self.started, device)
            for name, peer in self.peers.items():
                started = self._start(device)
                for number in range(self.steps):
                    peer(phase, step + 1 - self.steps + number)
                self._stop(self.timings[phase, name], started, device)

    def _place(self, batch_idx: int) -> tuple[str, int]:
        """The phase, and the number of the optimizer step in it."""
        phase, step = divmod(batch_idx // self.accumulation, self.steps_of_phase)
        return self.phases[phase], step

    def _start(self, device: torch.device) -> float:
        synchronize(device)
        self.graphs.append(counters["stats"]["unique_graphs"])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()

    def _stop(self, timing: Timing, started: float, device: torch.device) -> None:
        synchronize(device)
        timing.seconds.append((time.perf_counter() - started) / self.steps)
        if device.type == "cuda":
            timing.gib = max(timing.gib, torch.cuda.max_memory_allocated() / GIB)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
