"""The audit of all shards: several at once, each written as soon as it is done, so that a later call does only the rest."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from components.errors import RecipeError
from components.shards.names import names_in_index
from components.shards.one_shard import audit_shard
from components.shards.rows import Audit, ShardIndex, check_replaced, read_audit, write_shard, write_summary
from components.shards.storage import Storage
from components.shards.tar import Problem

UNREADABLE = "unreadable"
"""Kind of the problem of a shard that was not read to its end; the next audit tries it again."""

MAX_KEYS = 100_000_000
"""Samples whose keys are compared, which takes 0.8 GB."""


def audit(
    shards: list[str], folder: str | Path, processes: int, progress: bool = True, storage: Storage | None = None
) -> list[Audit]:
    """Shards in, what was found in each out; rows, audits and the summary of all are files of the index.

    A shard that is broken, cannot be read, or ends the process that reads it is reported and does not end the audit. Problems
    are counted; `problems_of` has them.

    Args:
        shards: Paths or urls.
        folder: Folder of the index. Shards whose audit is there and which have not changed are not read again.
        processes: Shards read at once, at least 1.
        progress: Whether to show a bar.
        storage: Reads the shards.

    Raises:
        RecipeError: The index cannot be written or is one of other shards, or two shards have one name.
    """
    folder, shards = Path(folder), sorted(shards)
    names = names_in_index(shards)
    check_replaced(folder, names)
    work = [(url, name, folder, storage or Storage()) for url, name in zip(shards, names, strict=True)]
    audits: dict[str, Audit] = {}
    samples = problems = 0
    with tqdm(total=len(work), desc="audit", unit="shard", disable=not progress) as bar:
        for one in _in_parallel(work, min(processes, len(work))):
            audits[one.name] = one
            samples, problems = samples + one.samples, problems + sum(one.counts.values())
            bar.set_postfix(samples=f"{samples:,}", problems=f"{problems:,}", refresh=False)
            bar.update()
    in_order = [audits[name] for _, name, _, _ in work]
    write_summary(folder, in_order)
    return in_order


def problems_of(folder: Path, audit: Audit) -> list[Problem]:
    """The problems of a shard, of which `audit` holds only those that no file has."""
    if audit.problems or not audit.counts:
        return audit.problems
    written = read_audit(folder, audit.name)
    return written.problems if written else []


def repeated_keys(index: ShardIndex) -> int | None:
    """How many samples of an index have the key of another one; None above 100 million samples, where it is not looked for."""
    if index.sizes.sum() > MAX_KEYS:
        return None
    keys = np.empty(int(index.sizes.sum()), np.uint64)
    ends = np.cumsum(index.sizes)
    for shard, (size, end) in enumerate(zip(index.sizes, ends, strict=True)):
        keys[end - size : end] = index.rows(shard)["key"]
    keys.sort()
    return int(np.count_nonzero(keys[1:] == keys[:-1]))


_Work = tuple[str, str, Path, Storage]


def _in_parallel(work: list[_Work], processes: int) -> Iterator[Audit]:
    """Audits as they are done. Where a process dies, the shards it may have died of are read once more, each alone."""
    waiting = work[::-1]
    while waiting:
        running: dict[Future[Audit], _Work] = {}
        with suppress(BrokenProcessPool), _pool(processes) as pool:
            while waiting or running:
                while waiting and len(running) < 2 * processes:
                    one = waiting[-1]
                    running[pool.submit(_audit_and_write, *one)] = one
                    waiting.pop()
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield done.result()
                    del running[done]
        for suspect in running.values():
            yield _alone(suspect)


def _alone(work: _Work) -> Audit:
    try:
        with _pool(1) as pool:
            return pool.submit(_audit_and_write, *work).result()
    except BrokenProcessPool:
        return _unreadable(work[0], work[1], "the process that read it died; it may have run out of memory")


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin)


def _begin() -> None:
    """A process that audits ends with the one that started it, and without a word on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _audit_and_write(url: str, name: str, folder: Path, storage: Storage) -> Audit:
    earlier = read_audit(folder, name)
    try:
        if earlier is not None and (earlier.size, earlier.version) == storage.identity(url):
            return replace(earlier, url=url, problems=[])
        found, rows = audit_shard(url, name, storage)
    except Exception as error:  # whatever it is, the other shards can be read
        reason = str(error) if isinstance(error, RecipeError) else f"{type(error).__name__}: {error}"
        return _unreadable(url, name, reason)
    finally:
        storage.close()
    write_shard(folder, found, rows)
    return replace(found, problems=[])  # those of 75,000 shards may be more than memory holds


def _unreadable(url: str, name: str, reason: str) -> Audit:
    return Audit(name, url, 0, "", 0, "", {UNREADABLE: 1}, [Problem(UNREADABLE, "", 0, reason)])
