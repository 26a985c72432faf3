"""A thread that ends a process which hangs, after it has written down where, so that the launcher can start it again.

Source: hang detection of NVIDIA's resiliency extension and the flight recorder of PyTorch. Differs: one file, no server.
"""

import faulthandler
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch.distributed

from callbacks.guards.hang_minutes import HangMinutes
from callbacks.guards.records import Samples
from components import phases

EXIT_CODE = os.EX_TEMPFAIL
"""75: it may go better another time."""

_STEPS_OF_THE_MEDIAN = 50
_MEDIANS = 10
_SECONDS_TO_WRITE = 60
_STDERR = 2


class Watchdog(threading.Thread):
    """Phases of this process in; its end with exit code 75 out, when one of them goes on for too long.

    Args:
        minutes: What is too long.
        run: The run folder, where `hang_rank_N.txt` tells what every thread was doing.
        rank: This rank.
        samples: The samples that are under way.
        before_end: Called when the process is about to be ended.
    """

    def __init__(self, minutes: HangMinutes, run: Path, rank: int, samples: Samples, before_end: Callable[[str], None]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.minutes = minutes
        self.folder = run
        self.rank = rank
        self.samples = samples
        self.before_end = before_end
        self.step_seconds: deque[float] = deque(maxlen=_STEPS_OF_THE_MEDIAN)
        self.over = threading.Event()
        self.ending = False
        least = min((limit for limit in vars(minutes).values() if limit is not None), default=1.0)
        self.pause = min(5.0, least * 60 / 10)

    def limit(self, phase: phases.Phase) -> float:
        """Seconds that a phase may take."""
        minutes = getattr(self.minutes, phase)
        seconds = float("inf") if minutes is None else minutes * 60
        if phase == "step" and self.step_seconds:
            seconds = max(seconds, _MEDIANS * median(list(self.step_seconds)))
        return seconds

    def run(self) -> None:
        """Look at the phase again and again."""
        awake = looked = time.monotonic()
        while not self.over.wait(self.pause):
            now = time.monotonic()
            if now - looked > 2 * self.pause + 1:
                awake = now  # this thread slept as well: the whole process was stopped for a while
            looked = now
            phase, seconds = phases.current()
            if min(seconds, now - awake) > self.limit(phase):
                self._end(phase, seconds)

    def stop(self) -> None:
        """The run is over. If it is so because another rank has ended first, for the same reason, this process ends as it did."""
        self.over.set()
        if self.ending:
            self.join()

    def _end(self, phase: phases.Phase, seconds: float) -> None:
        self.ending = True
        threading.Timer(_SECONDS_TO_WRITE, os._exit, [EXIT_CODE]).start()  # the disk may be what hangs
        told = (
            f"{socket.gethostname()}, rank {self.rank}: no progress in phase '{phase}' for {seconds:.0f} s; the limit is "
            f"{self.limit(phase):.0f} s (guards.hang_minutes.{phase}). The process ends with exit code {EXIT_CODE}.\n"
            f"Samples under way: {', '.join(self.samples.under_way) or 'none'}\n\n"
        )
        os.write(_STDERR, f"\n{told}".encode())
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"hang_rank_{self.rank}.txt").open("w", encoding="utf-8") as file:
            file.write(told)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        self.before_end(phase)
        _dump_collectives(self.folder / f"hang_nccl_rank_{self.rank}")
        time.sleep(2 * self.pause)  # the others wait for this process, and write theirs at about the same time
        os._exit(EXIT_CODE)


def _dump_collectives(file: Path) -> None:
    """What NCCL's flight recorder has seen, for `torchfrtrace RUN --prefix hang_nccl_rank_`."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None and torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        file.write_bytes(dump())
