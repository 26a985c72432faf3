"""The manifest of a checkpoint: its files with their sizes and hashes. A folder whose files are as it says is complete.

It is the last file that is written. Who looks for a checkpoint compares sizes, which costs nothing; the hashes are compared where a
run continues, by all ranks together, since reading everything takes as long as loading it.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MANIFEST = "manifest.json"
_BUFFER = 1 << 20


class FileFacts(NamedTuple):
    """What the manifest says of a file: its bytes, and their SHA-256, as `sha256sum` prints it."""

    size: int
    sha256: str


class _HashedFile(io.FileIO):
    """A file that is written from its beginning to its end, and hashed on the way: nothing is read again for it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: Any, /) -> int:
        written = super().write(data)
        self.hash.update(memoryview(data)[:written])
        self.size += written
        return written


@contextmanager
def hashed_file(path: Path, name: str, files: dict[str, FileFacts]) -> Iterator[BinaryIO]:
    """A new file to write; when it is on the disk, its facts are in `files` under `name`."""
    raw = _HashedFile(path)
    with io.BufferedWriter(raw, _BUFFER) as stream:
        yield stream
        if not stream.closed:  # else who closed it has synchronized it
            synchronize(stream)
    files[name] = FileFacts(raw.size, raw.hash.hexdigest())


def synchronize(stream: Any) -> None:
    """What was written to a file is on the disk, whatever happens to the machine."""
    stream.flush()
    os.fsync(stream.fileno())


def synchronize_folder(folder: Path) -> None:
    """The names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, step: int, ranks: int, files: dict[str, FileFacts]) -> None:
    """Write the manifest of a folder whose files are all on the disk."""
    content = {
        "step": step,
        "ranks": ranks,
        "versions": {package: version(package) for package in ("torch", "lightning", "transformers")},
        "files": {name: files[name]._asdict() for name in sorted(files)},
    }
    with (folder / MANIFEST).open("w") as stream:
        json.dump(content, stream, indent=1)
        synchronize(stream)
    synchronize_folder(folder)


def seal(folder: Path, step: int) -> None:
    """Put the files that lie in a folder on the disk, and write the manifest of what one process has written there."""
    files = {}
    for path in (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[str(path.relative_to(folder))] = file_facts(path)
    write_manifest(folder, step, 1, files)


def read_manifest(folder: Path) -> dict[str, FileFacts]:
    """The files of a checkpoint.

    Raises:
        OSError: There is no manifest.
        ValueError: It is damaged.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        return {name: FileFacts(facts["size"], facts["sha256"]) for name, facts in files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} lacks {error}") from error


def what_is_missing(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint, by the names and sizes of its files; None if it is one."""
    try:
        files = read_manifest(folder)
    except OSError:
        return f"it has no {MANIFEST}"
    except ValueError:
        return f"its {MANIFEST} is damaged"
    for name, facts in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != facts.size:
            return f"{name} has {size} bytes instead of {facts.size}"
    return None


def damaged_files(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Those of a checkpoint's files that do not have the hashes they were written with.

    Args:
        folder: A complete checkpoint.
        names: The files to read; by default all.
    """
    files = read_manifest(folder)
    return [name for name in (files if names is None else names) if file_facts(folder / name) != files[name]]


def file_facts(path: Path) -> FileFacts:
    """The facts of a file that is there already."""
    with path.open("rb") as stream:
        return FileFacts(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())
