"""Arrays beside a shard index, one for each shard: made in parallel, kept when the work is interrupted, opened when asked for."""

import json
import multiprocessing
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from components.atomic import save
from components.errors import RecipeError
from components.shards.rows import ShardIndex

OPEN = 256
"""Shards whose arrays a process keeps open: a few windows of them."""
Work = Callable[[int], tuple[np.ndarray, dict[str, Any]]]
"""A shard's number in, the array of its samples and what is to be remembered of it out."""


@dataclass
class ShardFiles:
    """An index and what is known of its samples in, one array a shard out: `NAME.KIND-HASH.npy`.

    Args:
        index: The index that the arrays belong to.
        kind: What they say: `select` or `tokens`.
        hash: Of all that decides them.
    """

    index: ShardIndex
    kind: str
    hash: str
    _open: "OrderedDict[int, np.ndarray]" = field(init=False, default_factory=OrderedDict, repr=False)

    def path(self, shard: int, ending: str) -> Path:
        """The file of a shard."""
        return self.index.file(shard, f"{self.kind}-{self.hash}.{ending}")

    def of_all(self, ending: str) -> Path:
        """The file of all shards together."""
        return self.index.folder / f"{self.kind}-{self.hash}.{ending}"

    def array(self, shard: int, derive: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        """The array of a shard, memory-mapped, or what is derived from it; those used last are kept.

        Raises:
            RecipeError: It is missing or damaged.
        """
        if (known := self._open.get(shard)) is not None:
            self._open.move_to_end(shard)
            return known
        path = self.path(shard, "npy")
        array = whole(path, int(self.index.sizes[shard]))
        if array is None:
            raise RecipeError(
                f"{path} is missing or damaged. Run python main.py index --config RECIPE, with the recipe of this run."
            )
        known = self._open[shard] = array if derive is None else derive(array)
        if len(self._open) > OPEN:
            self._open.popitem(last=False)
        return known

    def summary(self) -> dict[str, Any] | None:
        """What was written of all shards together, last of all; None where nothing was, or for another index."""
        try:
            summary: dict[str, Any] = json.loads(self.of_all("json").read_text())
            return summary if summary["index"] == self.index.fingerprint else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def make(
        self, work: Work, processes: int, label: str, version: Callable[[int], Any] = lambda shard: None
    ) -> list[dict[str, Any]]:
        """Do the work of every shard that has not been done, and give what is to be remembered of each shard.

        Args:
            work: What is to be done.
            processes: Processes that share it, >= 1.
            label: Its name in the progress bar.
            version: Of what the work of a shard reads besides its rows, as JSON holds it; where it is another one than when the
                work was done, it is done again.
        """
        return list(in_parallel(partial(self._make, work, version), range(len(self.index.names)), processes, label))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _make(self, work: Work, version: Callable[[int], Any], shard: int) -> dict[str, Any]:
        now = {"digest": self.index.digests[shard], "version": version(shard)}
        known = self._known(shard)
        if known is not None and known.items() >= now.items():
            return known
        array, facts = work(shard)
        facts = {**now, **facts}
        save_array(self.path(shard, "npy"), array)
        save_facts(self.path(shard, "json"), facts)  # last: it says that the array is whole
        return facts

    def _known(self, shard: int) -> dict[str, Any] | None:
        try:
            known: dict[str, Any] = json.loads(self.path(shard, "json").read_text())
        except (OSError, ValueError):
            return None
        return known if whole(self.path(shard, "npy"), int(self.index.sizes[shard])) is not None else None


def in_parallel(
    work: Callable[[int], Any], numbers: Iterable[int], processes: int, label: str, unit: str = "shard"
) -> Iterator[Any]:
    """What `work` gives for each number, in their order, with a progress bar; in this process where one is enough.

    Raises:
        RecipeError: A process died.
    """
    numbers = list(numbers)
    processes = min(processes, len(numbers))
    bar = partial(tqdm, total=len(numbers), desc=label, unit=unit, leave=False, disable=not numbers)
    if processes <= 1:
        yield from bar(map(work, numbers))
        return
    context = multiprocessing.get_context("fork")  # what is open here need not be opened again
    try:
        with ProcessPoolExecutor(processes, context, _hold, (work,)) as pool:
            yield from bar(pool.map(_call, numbers, chunksize=1 + len(numbers) // 10_000))  # or messages cost more than the work
    except BrokenProcessPool as error:
        raise RecipeError(
            f"{label}: a process ended before its work was done; perhaps for want of memory. Start again with fewer --processes: "
            "what is done is kept."
        ) from error


def whole(path: Path, size: int) -> np.ndarray | None:
    """The array of a file, memory-mapped; None where it is missing, damaged, or not of this size."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == (size,) else None


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array, as `np.load` reads it."""
    save(path, lambda file: np.save(file, array))


def save_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write what is to be remembered, as JSON."""
    save(path, lambda file: file.write(json.dumps(facts).encode()))


_held: Callable[[int], Any]


def _hold(work: Callable[[int], Any]) -> None:
    global _held
    _held = work


def _call(number: int) -> Any:
    return _held(number)
