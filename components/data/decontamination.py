"""Training pictures that evaluations ask about, of every kind of source that is read: what `python main.py index --against` finds.

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
    HASHED_AT_ONCE,
    Match,
    Overlap,
    Overlaps,
    Search,
    hash_pictures,
    write_lines,
)
from components.data.shard_files import ShardFiles, in_parallel
from components.data.sources.base import Source
from components.data.sources.dataset_folder import HuggingFaceDataset
from components.data.sources.folder import Folder
from components.data.sources.llava import LlavaConversations
from components.data.sources.question_answers import QuestionAnswers
from components.errors import BadSample
from components.shards.names import names_in_index
from components.shards.rows import ShardIndex
from components.shards.sample import Pair, read_sample
from components.shards.storage import Storage

__all__ = ["Overlaps", "find_overlaps", "find_overlaps_of_annotations", "find_overlaps_of_dataset", "overlaps_of"]

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

    names = names_in_index(index.names)  # the same wherever the shards lie

    def compare(shard: int) -> tuple[list[Overlap], set[int]]:
        matches, found = search.matches(np.load(files.path(shard, "npy")), lambda row: read(shard, row).image)
        keys = {row: read(shard, row).key for row in {match.row for match in matches}}
        return [search.overlap(names[shard], keys[match.row], match) for match in matches], found

    overlaps, seen = list[Overlap](), set[int]()
    for some, found in in_parallel(compare, range(len(names)), processes, "overlaps"):
        overlaps += some
        seen |= found
    numbers = {name: number for number, name in enumerate(names)}
    result = search.write(
        overlaps,
        lambda overlap: read(numbers[overlap.shard], overlap.row).image,
        output,
        "exclude.jsonl",
        "filters: {{exclude: {}}}",
        pictures=int(index.sizes.sum()),
        unreadable=sum(known["unreadable"] for known in facts),
        found=len(seen),
    )
    # the exact one of a sample last: it decides the kind
    kinds = {(overlap.shard, overlap.key): overlap.kind for overlap in sorted(overlaps, key=lambda o: o.kind, reverse=True)}
    lines = ({"shard": shard, "key": key, "kind": kind} for (shard, key), kind in sorted(kinds.items()))
    write_lines(result.without, map(json.dumps, lines))
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

    matches, unreadable, found = _matches(search, read, len(names), processes)
    overlaps, place = [], {}
    for match in matches:
        for number in named[names[match.row]]:
            key = str(records[number].get("id", number))
            overlaps.append(search.overlap(str(annotations), key, match._replace(row=number)))
            place[overlaps[-1]] = match.row
    result = search.write(
        overlaps, lambda overlap: read(place[overlap]), output, "kept.jsonl", "annotations: {}", len(names), unreadable, found
    )
    dropped = {overlap.row for overlap in overlaps}
    write_lines(result.without, _lines_of(records, dropped))
    return result


def find_overlaps_of_dataset(
    source: HuggingFaceDataset, folders: list[Path], distance: int, output: Path, processes: int
) -> Overlaps:
    """Which pictures of a Hugging Face dataset are those of evaluations, or nearly so.

    Args:
        source: The dataset; whatever it excludes by now is compared too.
        folders: As for `find_overlaps`; so are `distance`, `output` and `processes`.
        distance: 0 to 16.
        output: Folder for `overlaps.jsonl`, `overlaps.html` and `exclude.jsonl`.
        processes: At least 1.

    Raises:
        RecipeError: A folder is not there or holds no picture, or the dataset cannot be read.
    """
    whole = HuggingFaceDataset(source.path, source.split, source.images, source.follow_links)
    whole.open()
    search = Search(read_evaluation_pictures(folders, processes), distance)
    ends = np.cumsum(whole.num_pictures)  # pictures are counted through all records

    def read(picture: int) -> bytes:
        record = int(np.searchsorted(ends, picture, side="right"))
        return whole.pictures(record)[picture - int(ends[record])]

    matches, unreadable, found = _matches(search, read, int(ends[-1]), processes)
    overlaps, place = [], {}
    for match in matches:
        record = int(np.searchsorted(ends, match.row, side="right"))
        overlaps.append(search.overlap(source.path, whole.id(record), match._replace(row=record)))
        place[overlaps[-1]] = match.row
    pictures = int(ends[-1])
    result = search.write(
        overlaps, lambda overlap: read(place[overlap]), output, "exclude.jsonl", "exclude: {}", pictures, unreadable, found
    )
    kinds = {overlap.row: overlap.kind for overlap in sorted(overlaps, key=lambda o: o.kind, reverse=True)}
    lines = ({"shard": whole.short_name, "row": row, "kind": kind} for row, kind in sorted(kinds.items()))
    write_lines(result.without, map(json.dumps, lines))
    return result


def overlaps_of(source: Source, folders: list[Path], distance: int, output: Path, processes: int) -> list[str]:
    """What a source without shards shares with evaluations, in a few lines; the arguments are those of `find_overlaps`."""
    if isinstance(source, HuggingFaceDataset):
        return find_overlaps_of_dataset(source, folders, distance, output, processes).lines()
    if isinstance(source, LlavaConversations | QuestionAnswers):
        annotations, images = Path(source.annotations), Path(source.images)
        return find_overlaps_of_annotations(annotations, images, folders, distance, output, processes, source.follow_links).lines()
    return [f"{source.describe()}: its pictures are not compared with those of evaluations"]


def _matches(search: Search, read: Callable[[int], bytes], num_pictures: int, processes: int) -> tuple[list[Match], int, int]:
    """The matches of pictures that are read by their numbers, how many of them cannot be decoded, and how many are found."""

    def compare(first: int) -> tuple[list[Match], int, set[int]]:
        pictures = hash_pictures(_or_nothing(read, row) for row in range(first, min(first + HASHED_AT_ONCE, num_pictures)))
        matches, found = search.matches(pictures, lambda row: read(first + row))
        return [match._replace(row=first + match.row) for match in matches], int((~pictures["decoded"]).sum()), found

    parts = list(in_parallel(compare, range(0, num_pictures, HASHED_AT_ONCE), processes, "overlaps", f"{HASHED_AT_ONCE} pictures"))
    all_matches, unreadable, found = zip(*parts, strict=True) if parts else ((), (), ())
    return [match for matches in all_matches for match in matches], sum(unreadable), len(set[int]().union(*found))


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
    rows, first = index.rows(shard), 0
    if not len(rows):  # perhaps it cannot be read at all
        return
    index.check(shard, storage)
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
