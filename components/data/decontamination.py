"""Training pictures that evaluations ask about, of tar shards and of annotation files: what `python main.py index --against` finds.

The hashes of the training pictures are kept beside the index, shard by shard, so that an interrupted pass goes on where it was and
other evaluations are compared without reading the shards again.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from components.annotations import Annotations
from components.data.evaluation_pictures import read_evaluation_pictures
from components.data.overlaps import (
    EXCLUDE,
    HASHED_AT_ONCE,
    KEPT,
    NEAR,
    Match,
    Overlap,
    Overlaps,
    Search,
    hash_pictures,
    write_lines,
)
from components.data.shard_files import ShardFiles, in_parallel
from components.data.sources.folder import Folder
from components.errors import BadSample
from components.shards.rows import ShardIndex
from components.shards.sample import Pair, read_sample
from components.shards.storage import Storage

__all__ = ["NEAR", "Overlaps", "find_overlaps", "find_overlaps_of_annotations"]

_KIND = "pictures"
_LAYOUT = "1"  # of the hashes beside the index; raise it when they change
_READ_AT_ONCE = 16 * 2**20


def find_overlaps(
    index: ShardIndex, storage: Storage, folders: list[Path], distance: int, output: Path, processes: int
) -> Overlaps:
    """Which pictures of shards are those of evaluations, or nearly so.

    Args:
        index: The index of the shards.
        storage: Reads the shards.
        folders: Folders with the evaluations' pictures, at any depth or in .zip archives.
        distance: Bits in which the perceptual hashes of near pictures may differ, 0 to 16.
        output: Folder for `overlaps.jsonl`, `exclude.jsonl` and `overlaps.html`.
        processes: Processes that read, at least 1.

    Raises:
        RecipeError: A folder is not there or holds no picture, or a shard cannot be read.
    """
    search = Search(read_evaluation_pictures(folders, processes), distance)
    files = ShardFiles(index, _KIND, _LAYOUT)
    facts = files.make(partial(_hash_shard, index, storage), processes, "picture hashes")

    def read(shard: int, row: int) -> Pair:
        return read_sample(storage, index.names[shard], index.rows(shard)[row])

    def compare(shard: int) -> list[Overlap]:
        matches = search.matches(np.load(files.path(shard, "npy")), lambda row: read(shard, row).image)
        keys = {row: read(shard, row).key for row in {match.row for match in matches}}
        return [search.overlap(index.names[shard], keys[match.row], match) for match in matches]

    overlaps = [overlap for some in in_parallel(compare, range(len(index.names)), processes, "overlaps") for overlap in some]
    numbers = {name: number for number, name in enumerate(index.names)}
    result = search.write(
        overlaps,
        lambda overlap: read(numbers[overlap.shard], overlap.row).image,
        output,
        EXCLUDE,
        pictures=int(index.sizes.sum()),
        unreadable=sum(known["unreadable"] for known in facts),
    )
    keys = {(overlap.shard, overlap.key) for overlap in overlaps}
    write_lines(result.without, (json.dumps({"shard": shard, "key": key}) for shard, key in sorted(keys)))
    return result


def find_overlaps_of_annotations(
    annotations: Path, images: Path, folders: list[Path], distance: int, output: Path, processes: int, follow_links: bool = False
) -> Overlaps:
    """Which pictures that an annotation file names are those of evaluations, or nearly so.

    Args:
        annotations: A JSON or JSONL file of LLaVA conversations or of questions, with `image`.
        images: Folder that picture names are relative to.
        folders: As for `find_overlaps`; so are `distance`, `output` and `processes`.
        distance: 0 to 16.
        output: Folder for `overlaps.jsonl`, `overlaps.html` and `kept.jsonl`: the records without an overlap.
        processes: At least 1.
        follow_links: Whether links inside `images` may lead out of it.

    Raises:
        RecipeError: A folder is not there or holds no picture, or the file cannot be read.
    """
    records, folder = Annotations(annotations), Folder(str(images), str(annotations), follow_links)
    search = Search(read_evaluation_pictures(folders, processes), distance)
    named: dict[str, list[int]] = {}
    for number in range(len(records)):
        with suppress(BadSample):  # what cannot be parsed is not trained on either
            image = records[number].get("image")
            for name in image if isinstance(image, list) else [image]:
                if isinstance(name, str):
                    named.setdefault(name, []).append(number)
    names = list(named)

    def read(row: int) -> bytes:
        return folder.read(names[row])

    def compare(first: int) -> tuple[list[Match], int]:
        rows = range(first, min(first + HASHED_AT_ONCE, len(names)))
        pictures = hash_pictures(_or_nothing(read, row) for row in rows)
        matches = search.matches(pictures, lambda row: read(first + row))
        return [match._replace(row=first + match.row) for match in matches], int((~pictures["decoded"]).sum())

    parts = in_parallel(compare, range(0, len(names), HASHED_AT_ONCE), processes, "overlaps", f"{HASHED_AT_ONCE} pictures")
    overlaps, place = [], {}
    for match in (match for matches, _ in parts for match in matches):
        for number in named[names[match.row]]:
            key = str(records[number].get("id", number))
            overlaps.append(search.overlap(str(annotations), key, match._replace(row=number)))
            place[overlaps[-1]] = match.row
    result = search.write(
        overlaps,
        lambda overlap: read(place[overlap]),
        output,
        KEPT,
        pictures=len(names),
        unreadable=sum(unreadable for _, unreadable in parts),
    )
    dropped = {overlap.row for overlap in overlaps}
    write_lines(result.without, _lines_of(records, dropped))
    return result


def _lines_of(records: Annotations, dropped: set[int]) -> Iterator[str]:
    for number in range(len(records)):
        with suppress(BadSample):
            if number not in dropped:
                yield json.dumps(records[number])


def _hash_shard(index: ShardIndex, storage: Storage, shard: int) -> tuple[np.ndarray, dict[str, Any]]:
    pictures = hash_pictures(_pictures_of_shard(index, storage, shard))
    return pictures, {"unreadable": int((~pictures["decoded"]).sum())}


def _pictures_of_shard(index: ShardIndex, storage: Storage, shard: int) -> Iterator[bytes]:
    """The encoded pictures of a shard in the order of its rows, read in long pieces."""
    index.check(shard, storage)
    rows, first = index.rows(shard), 0
    starts = rows["image_offset"].astype(np.int64)
    ends = starts + rows["image_size"]
    while first < len(rows):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + _READ_AT_ONCE, side="right")))
        data = storage.read(index.names[shard], int(starts[first]), int(ends[last - 1] - starts[first]))
        for start, end in zip(starts[first:last] - starts[first], ends[first:last] - starts[first], strict=True):
            yield data[start:end]
        first = last


def _or_nothing(read: Callable[[int], bytes], row: int) -> bytes:
    """A picture; no bytes where it cannot be read, which is no picture either."""
    try:
        return read(row)
    except BadSample:
        return b""
