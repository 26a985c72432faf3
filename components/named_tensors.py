"""Named tensors in files, read one at a time, and their names in other layouts: safetensors, PyTorch files without code.

A file is opened for each tensor anew, so that memory holds that tensor alone, whatever the size of the files.
"""

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from components.errors import RecipeError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class NamedTensors(ABC):
    """Tensors by name. `where` says in messages where they come from."""

    where: str
    infos: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in the number format it is stored in; hold it no longer than needed."""

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Neighboring rows of the tensor, those of its first dimension, as `read` gives them."""
        return self.read(name)[rows]


class SafetensorsFiles(NamedTensors):
    """The tensors of one or more safetensors files.

    Args:
        files: The files.

    Raises:
        RecipeError: A file is missing, damaged or cut short.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self.infos = {}
        files = list(files)
        self.where = _place(files)
        for file in files:
            with reading(file), safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118, not a dictionary
                    part = stored.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise RecipeError(f"{file}: tensor {name} is stored as {part.get_dtype()}. Convert it to 16 or 32 bits.")
                    self._file_of[name] = file
                    self.infos[name] = TensorInfo(tuple(part.get_shape()), _DTYPES[part.get_dtype()])

    def read(self, name: str) -> Tensor:
        """The tensor; its memory is the file's."""
        with reading(self._file_of[name]), safe_open(self._file_of[name], framework="pt") as stored:
            return stored.get_tensor(name)

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of the tensor; the others are not read."""
        with reading(self._file_of[name]), safe_open(self._file_of[name], framework="pt") as stored:
            return stored.get_slice(name)[rows]


class TorchFiles(NamedTensors):
    """The tensors of one or more files of `torch.save`. Code in them is refused, never run.

    Args:
        files: The files.
        section: Key of the dictionary of tensors inside each file; null when the file is that dictionary.

    Raises:
        RecipeError: A file is missing, damaged, cut short, holds code, or no dictionary of tensors.
    """

    def __init__(self, files: Iterable[Path], section: str | None = None) -> None:
        self._section = section
        self._file_of: dict[str, Path] = {}
        self.infos = {}
        files = list(files)
        self.where = _place(files)
        for file in files:
            for name, tensor in self._open(file).items():
                if not isinstance(tensor, Tensor):
                    raise RecipeError(f"{file}: {name} is a {type(tensor).__name__}, not a tensor. Name a file of weights.")
                self._file_of[name] = file
                self.infos[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)

    def read(self, name: str) -> Tensor:
        """The tensor; its memory is the file's."""
        return self._open(self._file_of[name])[name]

    def _open(self, file: Path) -> dict[str, Any]:
        with reading(file), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # read or refused all the same
            mapped = zipped(file)  # files of torch before 1.6 cannot be mapped
            stored = torch.load(file, map_location="cpu", weights_only=True, **({"mmap": True} if mapped else {}))
        tensors = stored.get(self._section) if self._section and isinstance(stored, dict) else stored
        if not isinstance(tensors, dict):
            raise RecipeError(f"{file} holds no dictionary of tensors. Name a file of weights.")
        return tensors


class Renamed(NamedTensors):
    """Some of the tensors of another, under other names.

    Args:
        source: The tensors.
        rename: Their name here, or None for those that are not wanted.
    """

    def __init__(self, source: NamedTensors, rename: Callable[[str], str | None]) -> None:
        self.where = source.where
        self._source = source
        self._old = {new: old for old in source.infos if (new := rename(old)) is not None}
        self.infos = {new: source.infos[old] for new, old in self._old.items()}

    def read(self, name: str) -> Tensor:
        """The tensor."""
        return self._source.read(self._old[name])

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of the tensor."""
        return self._source.read_rows(self._old[name], rows)


@dataclass(frozen=True)
class Pairing:
    """One tensor of ours and the tensors of another layout that hold the same numbers.

    Args:
        ours: Name in our state dict.
        theirs: Names in the other layout; several lie one after another along the first dimension of ours.
        leading_one: Whether ours has a first dimension of 1 that theirs lacks.
    """

    ours: str
    theirs: tuple[str, ...]
    leading_one: bool = False

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Theirs in, ours out."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return joined.unsqueeze(0) if self.leading_one else joined

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Ours in, theirs by name out."""
        tensor = tensor.squeeze(0) if self.leading_one else tensor
        return dict(zip(self.theirs, tensor.chunk(len(self.theirs)), strict=True))


class Paired(NamedTensors):
    """Tensors of another layout under our names; pairings whose tensors are not all there are left out.

    Args:
        source: Tensors under their names.
        pairings: Which of them make up which of ours.
    """

    def __init__(self, source: NamedTensors, pairings: Iterable[Pairing]) -> None:
        self.where = source.where
        self._source = source
        self._pairings = {p.ours: p for p in pairings if all(name in source.infos for name in p.theirs)}
        self.infos = {name: self._info(pairing) for name, pairing in self._pairings.items()}

    def read(self, name: str) -> Tensor:
        """Our tensor, put together."""
        pairing = self._pairings[name]
        return pairing.join([self._source.read(their) for their in pairing.theirs])

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of our tensor; those of one that is put together are read with all others."""
        pairing = self._pairings[name]
        alone = len(pairing.theirs) == 1 and not pairing.leading_one
        return self._source.read_rows(pairing.theirs[0], rows) if alone else self.read(name)[rows]

    def _info(self, pairing: Pairing) -> TensorInfo:
        infos = [self._source.infos[name] for name in pairing.theirs]
        shape = infos[0].shape
        if len(infos) > 1:
            shape = (sum(info.shape[0] for info in infos), *shape[1:])
        return TensorInfo((1, *shape) if pairing.leading_one else shape, infos[0].dtype)


def weights_in(folder: Path) -> NamedTensors | None:
    """The weights of a Hugging Face folder: safetensors where there are any, else PyTorch files; None when there are none.

    Raises:
        RecipeError: The index names a file that is not there, or a file cannot be read.
    """
    for stem, kind in (("model.safetensors", SafetensorsFiles), ("pytorch_model.bin", TorchFiles)):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            with reading(index):
                shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return kind(folder / name for name in sorted(set(shards.values())))
        if (folder / stem).is_file():
            return kind([folder / stem])
    return None


@torch.no_grad()
def fill(state: dict[str, Tensor], source: NamedTensors) -> None:
    """Copy tensors into a model's own, one at a time. Those that the source lacks stay as they are.

    Args:
        state: The model's, by name. Of one that is sharded by rows, only the rows of this rank are read.
        source: Where they come from, in any number format.
    """
    for name, tensor in state.items():
        if name in source.infos:
            rows = rows_here(tensor)
            if rows is None:
                assign(tensor, source.read(name))
            else:
                tensor.to_local().copy_(source.read_rows(name, rows))  # type: ignore[attr-defined]


@torch.no_grad()
def assign(target: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a parameter, of which this rank may hold a part only."""
    if isinstance(target, DTensor):
        # every rank has read the whole tensor: nothing is sent
        here = values.to(target.device, target.dtype)
        values = distribute_tensor(here, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def rows_here(tensor: Tensor) -> slice | None:
    """The rows that this rank holds of a tensor that is sharded by rows; None for any other tensor."""
    if not isinstance(tensor, DTensor) or any(type(p) is not Replicate and p != Shard(0) for p in tensor.placements):
        return None
    first, count = 0, tensor.shape[0]
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):  # as torch.chunk does: all parts but the last are equal
            part = -(-count // tensor.device_mesh.size(axis))
            skipped = min(part * tensor.device_mesh.get_local_rank(axis), count)
            first, count = first + skipped, min(part, count - skipped)
    return slice(first, first + count)


def differences(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    """What does not fit between the names and shapes that a model has and those that were found, one line each."""
    return [
        *(f"missing: {name} {shape}" for name, shape in expected.items() if name not in found),
        *(f"unexpected: {name} {shape}" for name, shape in found.items() if name not in expected),
        *(
            f"mismatched: {name} is {found[name]}, should be {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]


def listed(problems: list[str], most: int = 12) -> str:
    """Problems as lines of a message, the first ones of many."""
    return "\n  ".join(problems[:most] + ([f"... and {len(problems) - most} more"] if len(problems) > most else []))


def zipped(file: Path) -> bool:
    """Whether a file of `torch.save` has the layout of torch 1.6 or later."""
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"


class reading:  # noqa: N801, reads as a statement
    """Turns what goes wrong while a file is read into a message that names it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise RecipeError(f"{error.filename or self.file} does not exist. Is the download complete?") from error
        if isinstance(error, UnpicklingError) and "weights_only" in str(error).lower():
            first = str(error).strip().splitlines()
            reason = next((line for line in first if "Unsupported" in line or "GLOBAL" in line), first[0])
            raise RecipeError(
                f"{self.file} holds code, not only tensors, and is not opened: {reason.strip()[:200]}\nUse weights in safetensors."
            ) from error
        if isinstance(error, (SafetensorError, UnpicklingError, EOFError, OSError, RuntimeError, ValueError, KeyError)):
            if isinstance(error, RecipeError):
                return
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise RecipeError(f"{self.file} is damaged or cut short: {reason}. Fetch it again.") from error


def _place(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else str(files[0].parent) if files else "no file"
