"""The state of a run between two optimizer steps: taken by all ranks together, then written by each of them without the others.

Source: torch.distributed.checkpoint, whose planner and files these are. Differs: the ranks talk to each other only while the
snapshot is taken and when all have written, so that what lies between may happen in a thread while they train on.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import distributed
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from components.manifest import FileFacts, hashed_file, synchronize_folder
from components.run_folder import STATE

REST = "meta.pt"
"""In a sharded checkpoint: what is no weight and no optimizer state. Lightning looks for it under this name."""
_METADATA = ".metadata"


@dataclass
class Part:
    """What one rank has written of a checkpoint."""

    files: dict[str, FileFacts] = field(default_factory=dict)
    results: list[WriteResult] = field(default_factory=list)


class Snapshot(ABC):
    """A state of a run that can be written, by every rank its part."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of tensors that this rank will write."""

    @abstractmethod
    def write(self, folder: Path) -> Part:
        """Write this rank's part into the checkpoint's folder: without the other ranks, in any thread, again where it failed."""

    @abstractmethod
    def finish(self, folder: Path, parts: list[Part]) -> dict[str, FileFacts]:
        """On the first rank, when all have written: complete the state, and give the facts of its files."""


def take_snapshot(trainer: Trainer, copy: bool) -> Snapshot:
    """The state of a run as it is now. Called on all ranks.

    Args:
        trainer: The trainer, between two optimizer steps.
        copy: Whether the state is copied, to memory of the CPU, so that the run may train on before it is written.
    """
    fresh = [optimizer for optimizer in trainer.optimizers if not optimizer.state]
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    for optimizer in fresh:  # torch has invented a state of zeros after one step, which must not stay: AdamW counts steps
        optimizer.state.clear()
    if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
        return _Sharded(trainer, checkpoint, copy)
    return _Whole(checkpoint, copy, trainer.is_global_zero)


class _Whole(Snapshot):
    """A state that every rank holds alike, in one file that the first rank writes."""

    def __init__(self, checkpoint: dict[str, Any], copy: bool, writes: bool) -> None:
        self.writes = writes
        self.checkpoint = checkpoint if writes else {}
        self.copy: io.BytesIO | None = None
        self._num_bytes = sum(_nbytes(self.checkpoint))
        if writes and copy:
            self.copy = io.BytesIO()
            torch.save(self.checkpoint, self.copy)
            self.checkpoint = {}

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def write(self, folder: Path) -> Part:
        part = Part()
        if self.writes:
            with hashed_file(folder / STATE, STATE, part.files) as stream:
                if self.copy is not None:
                    stream.write(self.copy.getbuffer())
                else:
                    torch.save(self.checkpoint, stream)
        return part

    def finish(self, folder: Path, parts: list[Part]) -> dict[str, FileFacts]:
        return parts[0].files


class _Sharded(Snapshot):
    """A state whose tensors lie over the ranks: everything that several ranks hold is written by one of them."""

    def __init__(self, trainer: Trainer, checkpoint: dict[str, Any], copy: bool) -> None:
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        tensors |= {f"optimizer_{number}": state for number, state in enumerate(checkpoint.pop("optimizer_states"))}
        planner = DefaultSavePlanner()
        planner.set_up_planner(tensors, is_coordinator=trainer.is_global_zero)
        ranks = trainer.world_size
        plans: list[Any] | None = [None] * ranks if trainer.is_global_zero else None
        distributed.gather_object(planner.create_local_plan(), plans)
        if plans is not None:
            plans, self.metadata = planner.create_global_plan(plans)
            plans = FileSystemWriter("").prepare_global_plan(plans)
            self.rest = io.BytesIO()
            torch.save(checkpoint, self.rest)
        mine: list[Any] = [None]
        distributed.scatter_object_list(mine, plans)
        self.plan: SavePlan = planner.finish_plan(mine[0])
        self.planner: Any = _Copies(planner, self.plan) if copy else planner

    @property
    def num_bytes(self) -> int:
        tensors = [item.tensor_data for item in self.plan.items if item.tensor_data is not None]
        return sum(math.prod(tensor.chunk.sizes) * tensor.properties.dtype.itemsize for tensor in tensors)

    def write(self, folder: Path) -> Part:
        part = Part()
        state = folder / STATE
        state.mkdir(parents=True, exist_ok=True)  # on a disk that is not shared, the first rank's folder is not there
        part.results = _writer(state, part.files).write_data(self.plan, self.planner).value()
        synchronize_folder(state)
        return part

    def finish(self, folder: Path, parts: list[Part]) -> dict[str, FileFacts]:
        state = folder / STATE
        files = {name: facts for part in parts for name, facts in part.files.items()}
        _writer(state, files).finish(self.metadata, [part.results for part in parts])
        files[f"{STATE}/{_METADATA}"] = files.pop(f"{STATE}/{_METADATA}.tmp")
        with hashed_file(state / REST, f"{STATE}/{REST}", files) as stream:
            stream.write(self.rest.getbuffer())
        synchronize_folder(state)
        return files


class _Copies:
    """What a plan writes, as it is now, for a writer that asks for it later."""

    def __init__(self, planner: DefaultSavePlanner, plan: SavePlan) -> None:
        self.data = {item.index: _copy(planner.resolve_data(item)) for item in plan.items}

    def resolve_data(self, item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self.data[item.index]


def _copy(data: torch.Tensor | io.BytesIO) -> torch.Tensor | io.BytesIO:
    return data.detach().to("cpu", copy=True) if isinstance(data, torch.Tensor) else data


def _writer(folder: Path, files: dict[str, FileFacts]) -> FileSystemWriter:
    writer = FileSystemWriter(folder)
    writer.fs = _HashedFiles(files)
    return writer


class _HashedFiles(FileSystem):
    """torch's files, hashed as they are written."""

    def __init__(self, files: dict[str, FileFacts]) -> None:
        self.files = files

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        assert mode == "wb"
        with hashed_file(Path(path), f"{STATE}/{Path(path).name}", self.files) as stream:
            yield stream


def _nbytes(tree: Any) -> Iterator[int]:
    """Bytes of every tensor in a tree of dictionaries and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree.nbytes
    elif isinstance(tree, dict | list | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _nbytes(branch)
