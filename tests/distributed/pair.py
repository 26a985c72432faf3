"""The processes of a distributed run, started once and given one function after another, with a limit on how long each may take.

They are forked from one process that has imported what they need, which takes longer than most tests.
"""

import gc
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch.multiprocessing as multiprocessing

PRELOADED = ["tiny", "components.command_line", "peft", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama"]


class Processes:
    """Functions in, their results on all ranks out. After an error or a hang, new processes are started.

    Args:
        number: Of processes; the world size.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.processes: list[Any] = []

    def run(self, function: Callable, *arguments: Any, seconds: float = 60) -> list[Any]:
        """Call `function(*arguments)` in all processes, which know their rank as LOCAL_RANK."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        deadline = time.monotonic() + seconds
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                results.append((False, f"rank {rank} did not finish within {seconds} s"))
            else:
                try:
                    results.append(pipe.recv())
                except EOFError:
                    results.append((False, f"rank {rank} died"))
            if not results[-1][0]:
                deadline = time.monotonic() + 1  # the others may be waiting for it
        if not all(succeeded for succeeded, _ in results):
            self.close()
            raise AssertionError("\n".join(str(result) for succeeded, result in results if not succeeded))
        return [result for _, result in results]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def _start(self) -> None:
        ends = [multiprocessing.Pipe() for _ in range(self.number)]
        self.pipes = [ours for ours, _ in ends]
        self.processes = fork(_serve, [(theirs,) for _, theirs in ends])
        for _, theirs in ends:
            theirs.close()


def fork(target: Callable, arguments: list[tuple]) -> list[Any]:
    """The processes of a run, one for each tuple of arguments, on their way through `target`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)} for rank in range(len(arguments))]
    processes = [
        context.Process(target=_at_place, args=(place, target, each), daemon=True)
        for place, each in zip(places, arguments, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # which the fork server of Python 3.11 does not get otherwise
        for process in processes:
            process.start()
    return processes


def _at_place(place: dict[str, str], target: Callable, arguments: tuple) -> None:
    import torch

    gc.freeze()  # what has been imported is not garbage
    torch.set_num_threads(1)
    os.environ.update(NODE_RANK="0", GLOO_SOCKET_IFNAME="lo", **place)
    target(*arguments)


def _serve(pipe: Connection) -> None:
    rank = os.environ["LOCAL_RANK"]
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
