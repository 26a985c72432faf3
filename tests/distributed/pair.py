"""The processes of a distributed run, started once and given one function after another, with a limit on how long each may take.

They are forked from one process that has imported what they need, which takes longer than most tests.
"""

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
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tiny"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ends = [context.Pipe() for _ in range(self.number)]
        self.pipes = [ours for ours, _ in ends]
        arguments = [(rank, port, theirs) for rank, (_, theirs) in enumerate(ends)]
        self.processes = [context.Process(target=_serve, args=each, daemon=True) for each in arguments]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # which the fork server of Python 3.11 does not get otherwise
            for process in self.processes:
                process.start()
        for _, theirs in ends:
            theirs.close()


def _serve(rank: int, port: int, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0", GLOO_SOCKET_IFNAME="lo")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
