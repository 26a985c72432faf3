"""Annotation files: the records of a LLaVA .json array or a .jsonl file, memory-mapped and parsed one at a time."""

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from components.atomic import save
from components.errors import BadSample, RecipeError

Ranges = Int64[np.ndarray, "records 2"]
"""First byte of every record and the byte after its last."""

_BLOCK = 2**24
_LAYOUT = 1  # of the cached ranges; raise it when they change
_DEPTH_STEP = np.zeros(256, dtype=np.int8)
_DEPTH_STEP[list(b"[{")] = 1
_DEPTH_STEP[list(b"]}")] = -1


class Annotations:
    """An annotation file in, its records out: `annotations[i]` is a dict, parsed when it is asked for.

    The byte range of every record is found in one pass and kept in the user's cache folder. The records stay in the file, so any
    number of worker processes share one copy in the page cache.

    Args:
        path: A file with one JSON array of objects, or with one JSON object a line, in UTF-8.

    Raises:
        RecipeError: The file is missing, empty or truncated, or holds something else than objects.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data = _map(self.path)
        self._ranges = _load_or_find_ranges(self.path, self._data)
        self[len(self) - 1]  # a truncated download shows at once, not after hours of training

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._ranges[index]
        text = self._data[start:end]
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(
                f"{self.where(index)} is not valid JSON: {error}.\n    {_excerpt(text)}\n"
                "The file may be truncated: fetch it again, or repair or remove the line."
            ) from error
        if not isinstance(record, dict):
            raise BadSample(f"{self.where(index)} is not a JSON object: {_excerpt(text)}. Remove it or make it an object.")
        return record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def size(self) -> int:
        """Size of the file, in bytes."""
        return len(self._data)

    def sizes(self, indices: Int64[np.ndarray, " records"]) -> Int64[np.ndarray, " records"]:
        """Sizes of records, in bytes: known without reading them."""
        ranges = np.asarray(self._ranges[indices])
        return ranges[:, 1] - ranges[:, 0]

    def where(self, index: int) -> str:
        """Where a record stands, for error messages: `file.jsonl line 17`."""
        line = f"{self.path} line {_line_number(self._data, int(self._ranges[index][0]))}"
        return f"{line} (record {index % len(self) + 1})" if _is_array(self._data) else line

    def __getstate__(self) -> dict[str, Any]:
        cached = isinstance(self._ranges, np.memmap)
        return {"path": self.path, "ranges": None if cached else self._ranges}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._ranges = state["path"], state["ranges"]
        self._data = _map(self.path)
        if self._ranges is None:
            self._ranges = _load_or_find_ranges(self.path, self._data)


def cache_folder() -> Path:
    """Where what was found out about files is kept: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm_recipes"


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise RecipeError(f"There is no annotation file {path}. Download it or correct its path in the recipe's data.") from error
    except PermissionError as error:
        raise RecipeError(f"The annotation file {path} may not be read. Give yourself read permission (chmod u+r).") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise RecipeError(f"The annotation file {path} is empty (0 bytes). Fetch it again.") from error


def _load_or_find_ranges(path: Path, data: mmap.mmap) -> Ranges:
    with contextlib.suppress(OSError, RuntimeError, ValueError, EOFError):  # none yet, or one damaged by a full disk
        return np.load(_cache_file(path), mmap_mode="r")
    ranges = _array_ranges(path, data) if _is_array(data) else _line_ranges(data)
    if len(ranges) == 0:
        raise RecipeError(f"The annotation file {path} holds no records. Fetch it again or name another file.")
    with contextlib.suppress(OSError, RuntimeError, RecipeError):  # a cache that cannot be written only costs the next start a pass
        save(_cache_file(path), lambda file: np.save(file, ranges))
        return np.load(_cache_file(path), mmap_mode="r")
    return ranges


def _cache_file(path: Path) -> Path:
    stat = path.stat()
    identity = f"{_LAYOUT} {path.absolute()} {stat.st_size} {stat.st_mtime_ns}".encode(errors="surrogateescape")
    return cache_folder() / f"{hashlib.blake2b(identity, digest_size=16).hexdigest()}.npy"


def _line_ranges(data: mmap.mmap) -> Ranges:
    newlines = np.concatenate(
        [np.flatnonzero(np.frombuffer(data[at : at + _BLOCK], np.uint8) == ord("\n")) + at for at in range(0, len(data), _BLOCK)]
    )
    starts = np.concatenate([[_content_start(data)], newlines + 1])
    ends = np.concatenate([newlines, [len(data)]])
    keep = ends > starts
    # an object begins with a brace; only lines that do not can be blank
    for line in np.flatnonzero(keep):
        if data[starts[line]] != ord("{"):
            keep[line] = bool(data[starts[line] : ends[line]].strip())
    return np.stack([starts[keep], ends[keep]], axis=1).astype(np.int64)


def _array_ranges(path: Path, data: mmap.mmap) -> Ranges:
    """Ranges of the records of an array: brackets outside of strings, counted in blocks of bytes."""
    starts, ends, depth, in_string = [], [], 0, 0
    begin = _content_start(data)
    at = begin
    while at < len(data):
        end = min(at + _BLOCK, len(data))
        while end < len(data) and data[end - 1] == ord("\\"):  # a block never parts a backslash from what it escapes
            end += 1
        block = np.frombuffer(data[at:end], np.uint8)
        quotes = _string_quotes(block)
        steps = _DEPTH_STEP[block]
        brackets = np.flatnonzero(steps)
        brackets = brackets[(np.searchsorted(quotes, brackets) + in_string) % 2 == 0]
        steps = steps[brackets]
        depths = depth + np.cumsum(steps, dtype=np.int64)
        starts.append(at + brackets[(steps == 1) & (depths == 2)])
        ends.append(at + brackets[(steps == -1) & (depths == 1)] + 1)
        depth = int(depths[-1]) if len(depths) else depth
        in_string = (in_string + len(quotes)) % 2
        at = end
    ends_array = np.concatenate(ends)
    ranges = np.stack([np.concatenate(starts)[: len(ends_array)], ends_array], axis=1).astype(np.int64)
    if depth or in_string:
        raise RecipeError(_truncated(path, data, ranges))
    _check_between(path, data, begin, ranges)
    return ranges


def _string_quotes(block: np.ndarray) -> np.ndarray:
    """Positions of the quotes that open or close a string: those not after an odd number of backslashes."""
    quotes = np.flatnonzero(block == ord('"'))
    backslashes = np.flatnonzero(block == ord("\\"))
    run_starts = backslashes[np.diff(backslashes, prepend=-2) != 1]
    run_ends = backslashes[np.diff(backslashes, append=len(block) + 1) != 1] + 1
    escaped = run_ends[(run_ends - run_starts) % 2 == 1]
    return np.setdiff1d(quotes, escaped, assume_unique=True)


def _check_between(path: Path, data: mmap.mmap, begin: int, ranges: Ranges) -> None:
    """Between the records of an array there is a comma, and nothing else: a number or a string there would be lost unseen."""
    opening, closing = (int(ranges[0, 0]), int(ranges[-1, 1])) if len(ranges) else (begin + 1, begin + 1)
    gaps = [(begin, opening, b"["), *((end, start, b",") for end, start in zip(ranges[:-1, 1], ranges[1:, 0], strict=True))]
    for start, end, expected in [*gaps, (closing, len(data), b"]")]:
        between = data[start:end].strip()
        if between != expected:
            raise RecipeError(
                f"{path} line {_line_number(data, int(start))}: the array should go on with {expected.decode()!r} "
                f"but has {_excerpt(between)}. Every record must be a JSON object; repair the file."
            )


def _truncated(path: Path, data: mmap.mmap, ranges: Ranges) -> str:
    last = "no record is whole"
    if len(ranges):
        start, end = (int(at) for at in ranges[-1])
        name = ""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            name = f" (id {json.loads(data[start:end])['id']})"
        last = f"the last whole record is number {len(ranges)}{name}, which ends in line {_line_number(data, end)}"
    return f"The JSON array in {path} does not end: {last}. The file is truncated at {len(data)} bytes; fetch it again."


def _content_start(data: mmap.mmap) -> int:
    at = 3 if data[:3] == b"\xef\xbb\xbf" else 0  # byte order mark
    while at < len(data) and data[at] in b" \t\r\n":
        at += 1
    return at


def _is_array(data: mmap.mmap) -> bool:
    start = _content_start(data)
    return data[start : start + 1] == b"["


def _line_number(data: mmap.mmap, offset: int) -> int:
    return 1 + sum(data[at : min(at + _BLOCK, offset)].count(b"\n") for at in range(0, offset, _BLOCK))


def _excerpt(text: bytes) -> str:
    shown = text if len(text) <= 120 else text[:80] + b" ... " + text[-35:]
    return shown.decode(errors="replace")
