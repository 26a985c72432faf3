"""One checkpoint on its way to the disk: written under another name by all ranks, at once or in a thread, and then made visible."""

import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lightning import Trainer
from torch import distributed

from callbacks.checkpoint.snapshot import Part, take_snapshot
from components.manifest import hashed_file, synchronize_folder, what_is_missing, write_manifest
from components.run_folder import RECIPE, UNFINISHED

WAITS = (2.0, 10.0)
"""Seconds before a write that failed is tried again, as often as there are numbers."""

GIB = 2**30


def size(num_bytes: int) -> str:
    """Bytes, as people say them."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def first_problem(trainer: Trainer, problem: str | None) -> str | None:
    """What went wrong on any rank, in the same words on all of them. Called on all ranks."""
    if trainer.strategy.reduce_boolean_decision(problem is None, all=True):
        return None
    met = [problem and f"rank {trainer.global_rank} on {socket.gethostname()}: {problem}"] * trainer.world_size
    if trainer.world_size > 1:
        distributed.all_gather_object(met, met[0])
    told = [problem for problem in met if problem]
    return told[0] + (f" ({len(told) - 1} more ranks failed)" if len(told) > 1 else "")


class Saving:
    """A run between two steps in, a complete checkpoint or what prevented it out. Every method is called on all ranks.

    Args:
        trainer: The trainer of the run.
        run: The run folder.
        final: The folder under which the checkpoint becomes visible.
        asynchronous: Whether to write in a thread, from a copy in the memory of the CPU.
    """

    def __init__(self, trainer: Trainer, run: Path, final: Path, asynchronous: bool) -> None:
        self.trainer = trainer
        self.step = trainer.global_step
        self.run = run
        self.final = final
        self.unfinished = final.with_name(final.name + UNFINISHED)
        self.begin = time.monotonic()
        self.seconds = 0.0
        self.num_bytes = 0
        self.part: Part | None = None
        self.problem: str | None = None
        self._try(self._make_folder)
        self.snapshot = take_snapshot(trainer, copy=asynchronous)
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True) if asynchronous else None
        if self.thread is None:
            self._write()
        else:
            self.thread.start()

    def is_written(self) -> bool:
        """Whether all ranks have written what is theirs."""
        return self.trainer.strategy.reduce_boolean_decision(self.thread is None or not self.thread.is_alive(), all=True)

    def finish(self) -> str | None:
        """Wait until it is written, and make it visible.

        Returns:
            What prevented it, if anything, in the same words on every rank.
        """
        if self.thread is not None:
            self.thread.join()
        ranks = self.trainer.world_size
        self.problem = first_problem(self.trainer, self.problem)
        mine = (self.snapshot.num_bytes, self.part)
        gathered = [mine] if ranks == 1 else [mine] * ranks if self.trainer.is_global_zero else None
        if ranks > 1:
            distributed.gather_object(mine, gathered)
        if gathered is not None:
            self.num_bytes = sum(num_bytes for num_bytes, _ in gathered)
            if self.problem is None:
                self._try(lambda: self._make_visible([part for _, part in gathered]))
            if self.problem is not None:
                shutil.rmtree(self.unfinished, ignore_errors=True)
        self.problem, self.num_bytes = self.trainer.strategy.broadcast((self.problem, self.num_bytes))
        self.seconds = time.monotonic() - self.begin
        return self.problem

    def _make_folder(self) -> None:
        if self.trainer.is_global_zero:
            if self.unfinished.exists():  # of a save that failed
                shutil.rmtree(self.unfinished)
            self.unfinished.mkdir(parents=True)

    def _write(self) -> None:
        if self.problem is None:
            self._try(self._write_part)

    def _write_part(self) -> None:
        self.part = self.snapshot.write(self.unfinished)

    def _make_visible(self, parts: list[Part]) -> None:
        files = self.snapshot.finish(self.unfinished, parts)
        with hashed_file(self.unfinished / RECIPE, RECIPE, files) as stream:
            stream.write((self.run / RECIPE).read_bytes())
        write_manifest(self.unfinished, self.step, self.trainer.world_size, files)
        if missing := what_is_missing(self.unfinished):
            raise FileNotFoundError(f"{missing}. Is the folder on a disk that all nodes share?")
        if self.final.exists():
            raise FileExistsError(f"{self.final} exists already, and nothing is written over. Does another process train this run?")
        self.unfinished.rename(self.final)
        synchronize_folder(self.final.parent)

    def _try(self, write: Callable[[], None]) -> None:
        """Write, again if it fails; what prevents it in the end is kept, for this rank alone must not leave the others waiting."""
        problem = ""
        for wait in (*WAITS, None):
            try:
                write()
                return
            except Exception as error:  # whatever it is, the other ranks wait
                problem = str(error) or type(error).__name__
            if wait is not None:
                time.sleep(wait)
        self.problem = problem
