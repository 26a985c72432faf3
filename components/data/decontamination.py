"""Training pictures that evaluations ask about: equal files, and near ones by perceptual hashes, of tar shards and of LLaVA files.

`python main.py index --against FOLDER` calls, for the shards of an index:

    find_overlaps(index: ShardIndex, storage: Storage, folders: list[Path], distance: int, output: Path, processes: int) -> Overlaps

The hashes of the training pictures are kept beside the index, shard by shard, so that an interrupted pass goes on where it was and
other evaluations are compared without reading the shards again.

Which copies of photographs are found, as shares of 200 (`python -m tests.benchmarks decontamination FOLDER`); 8 bits are the default:
among 2 x 10^8 pairs of unrelated pictures no hash is as near, and with 10 bits a look-up takes four times as long.

| copy | 2 bits | 4 bits | 6 bits | 8 bits | 10 bits |
|---|---|---|---|---|---|
| quality 50 to 95, half or double size, squashed, gray | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |
| 20 % brighter | 0.950 | 0.990 | 1.000 | 1.000 | 1.000 |
| 2 % of each side cut off | 0.655 | 0.920 | 1.000 | 1.000 | 1.000 |
| 5 % of each side cut off | 0.225 | 0.600 | 0.825 | 0.935 | 0.985 |
| 10 % of each side cut off | 0.000 | 0.030 | 0.130 | 0.255 | 0.340 |
| mirrored | 0.000 | 0.000 | 0.000 | 0.000 | 0.000 |

Drawings of one layout, such as diagrams, are near one another although they differ in what is asked; fewer bits part more of them.
Of symmetric drawings many frequencies are equal, so a recompressed copy may be missed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from components.annotations import Annotations
from components.data.evaluation_pictures import EvaluationPictures, read_evaluation_pictures
from components.data.overlap_page import SideBySide, page
from components.data.shard_files import ShardFiles, in_parallel
from components.data.sources.folder import Folder
from components.errors import BadSample
from components.perceptual_hash import HashTable, perceptual_hash, picture_gray, same_picture
from components.shards.rows import ShardIndex
from components.shards.sample import Pair, read_sample
from components.shards.storage import Storage
from components.turns import parse_llava

NEAR = 8
"""Bits of the perceptual hash in which near pictures may differ, where nothing else is said."""
PICTURE = np.dtype([("digest", "<u8"), ("hash", "<u8"), ("decoded", "?")])
"""A training picture: the first 8 bytes of the SHA-256 of its file, its perceptual hash, and whether it could be decoded."""
_KIND = "pictures"
_LAYOUT = "1"  # of the hashes beside the index; raise it when they change
_READ_AT_ONCE = 16 * 2**20
_HASHED_AT_ONCE = 256
_MOST = 16  # overlaps that are listed of one training picture, nearest first
_SHOWN = 60


@dataclass(frozen=True)
class Overlap:
    """A training picture that an evaluation asks about.

    Args:
        shard: The shard, or the annotation file.
        key: Key of the sample in the shard, or its id in the file.
        row: Row of the index, or number of the record in the file.
        picture: The evaluation's picture.
        kind: `exact`: equal bytes; `near`: it looks the same.
        distance: Bits in which the perceptual hashes differ.
    """

    shard: str
    key: str
    row: int
    picture: str
    kind: Literal["exact", "near"]
    distance: int


@dataclass(frozen=True)
class Overlaps:
    """What was found and where it is written.

    Args:
        evaluation: Evaluation pictures that were looked for.
        broken: Evaluation pictures that cannot be decoded, each with the reason: they were not looked for.
        pictures: Training pictures that were compared.
        unreadable: Training pictures that cannot be decoded: their bytes alone were compared.
        exact: Training samples with a picture equal to an evaluation's.
        near: Training samples with a picture that only looks like an evaluation's.
        found: Evaluation pictures of which there is a copy.
        overlaps: File of all overlaps, one JSON object a line.
        exclude: File with shard and key of each of those samples: what `filters.exclude` of a source names.
        page: HTML page that shows some of them.
    """

    evaluation: int
    broken: list[str]
    pictures: int
    unreadable: int
    exact: int
    near: int
    found: int
    overlaps: Path
    exclude: Path
    page: Path

    def lines(self) -> list[str]:
        """The result in a few lines for the terminal."""
        lines = [
            f"{self.exact + self.near:,} of {self.pictures:,} training pictures overlap with {self.found:,} of {self.evaluation:,} "
            f"evaluation pictures: {self.exact:,} exact, {self.near:,} near.",
            f"All: {self.overlaps}. Some side by side: {self.page}. To train without them: `exclude: {self.exclude}` in the "
            "source's filters.",
        ]
        if self.unreadable:
            lines.append(f"{self.unreadable:,} training pictures cannot be decoded; their bytes alone were compared.")
        if self.broken:
            lines.append(f"{len(self.broken):,} evaluation pictures cannot be decoded and were not looked for:")
            lines += [f"  {line}" for line in self.broken[:10]] + [f"  and {len(self.broken) - 10:,} others"] * (
                len(self.broken) > 10
            )
        return lines


class _Match(NamedTuple):
    row: int
    found: int
    kind: Literal["exact", "near"]
    distance: int


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
    search = _Search(read_evaluation_pictures(folders, processes), distance)
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
    return search.write(
        overlaps,
        lambda overlap: read(numbers[overlap.shard], overlap.row).image,
        output,
        pictures=int(index.sizes.sum()),
        unreadable=sum(known["unreadable"] for known in facts),
    )


def find_overlaps_of_annotations(
    annotations: Path, images: Path, folders: list[Path], distance: int, output: Path, processes: int, follow_links: bool = False
) -> Overlaps:
    """Which pictures that a LLaVA file names are those of evaluations, or nearly so.

    Args:
        annotations: The JSON or JSONL file.
        images: Folder that picture names are relative to.
        folders: As for `find_overlaps`; so are `distance`, `output` and `processes`.
        distance: 0 to 16.
        output: The folder.
        processes: At least 1.
        follow_links: Whether links inside `images` may lead out of it.

    Raises:
        RecipeError: A folder is not there or holds no picture, or a record is none of LLaVA's.
    """
    records, folder = Annotations(annotations), Folder(str(images), str(annotations), follow_links)
    search = _Search(read_evaluation_pictures(folders, processes), distance)
    named: dict[str, list[int]] = {}
    for number in range(len(records)):
        with suppress(BadSample):  # what cannot be parsed is not trained on either
            for name in parse_llava(records[number])[1]:
                named.setdefault(name, []).append(number)
    names = list(named)

    def read(row: int) -> bytes:
        return folder.read(names[row])

    def compare(first: int) -> tuple[list[_Match], int]:
        rows = range(first, min(first + _HASHED_AT_ONCE, len(names)))
        pictures = _hash_pictures(_or_nothing(read, row) for row in rows)
        matches = search.matches(pictures, lambda row: read(first + row))
        return [match._replace(row=first + match.row) for match in matches], int((~pictures["decoded"]).sum())

    parts = in_parallel(compare, range(0, len(names), _HASHED_AT_ONCE), processes, "overlaps", f"{_HASHED_AT_ONCE} pictures")
    overlaps, place = [], {}
    for match in (match for matches, _ in parts for match in matches):
        for number in named[names[match.row]]:
            key = str(records[number].get("id", number))
            overlaps.append(search.overlap(str(annotations), key, match._replace(row=number)))
            place[overlaps[-1]] = match.row
    return search.write(
        overlaps,
        lambda overlap: read(place[overlap]),
        output,
        pictures=len(names),
        unreadable=sum(unreadable for _, unreadable in parts),
    )


class _Search:
    """The evaluations' pictures, as training pictures are compared with them."""

    def __init__(self, evaluation: EvaluationPictures, distance: int) -> None:
        self.evaluation = evaluation
        self.table = HashTable(evaluation.hashes, distance)
        starts = np.ascontiguousarray(evaluation.digests[:, :8]).view("<u8")[:, 0]
        self.order = np.argsort(starts, kind="stable")
        self.starts = starts[self.order]

    def matches(self, pictures: np.ndarray, read: Callable[[int], bytes]) -> list[_Match]:
        """Hashed training pictures in, their matches out: what the hashes suggest is confirmed by the pictures themselves."""
        evaluation = self.evaluation
        first = np.searchsorted(self.starts, pictures["digest"])
        last = np.searchsorted(self.starts, pictures["digest"], side="right")
        decoded = np.flatnonzero(pictures["decoded"])
        query, near, distances = self.table.search(pictures["hash"][decoded])
        candidates: dict[int, list[tuple[int, int]]] = {int(row): [] for row in np.flatnonzero(last > first)}
        for row, found, distance in zip(decoded[query].tolist(), near.tolist(), distances.tolist(), strict=True):
            candidates.setdefault(row, []).append((found, distance))
        matches = []
        for row, others in sorted(candidates.items()):
            data = read(row)
            digest = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
            equal = [
                int(found) for found in self.order[first[row] : last[row]] if np.array_equal(evaluation.digests[found], digest)
            ]
            of_row = [_Match(row, found, "exact", 0) for found in equal]
            others = sorted((distance, found) for found, distance in others if found not in equal)
            if others:
                gray = np.broadcast_to(picture_gray(data), (len(others), 32, 32))
                alike = same_picture(gray, evaluation.grays[[found for _, found in others]])
                of_row += [
                    _Match(row, found, "near", distance) for (distance, found), yes in zip(others, alike, strict=True) if yes
                ]
            matches += of_row[:_MOST]
        return matches

    def overlap(self, shard: str, key: str, match: _Match) -> Overlap:
        """A match with names."""
        return Overlap(shard, key, match.row, self.evaluation.files[match.found].name, match.kind, match.distance)

    def write(
        self, overlaps: list[Overlap], read: Callable[[Overlap], bytes], output: Path, pictures: int, unreadable: int
    ) -> Overlaps:
        """Write what was found."""
        overlaps = sorted(
            overlaps, key=lambda overlap: (overlap.shard, overlap.row, overlap.kind, overlap.distance, overlap.picture)
        )
        kinds = {(overlap.shard, overlap.key): overlap.kind for overlap in reversed(overlaps)}  # exact comes first
        by_name = {file.name: file for file in self.evaluation.files}
        doubtful = sorted(overlaps, key=lambda overlap: -overlap.distance)
        pairs = (
            SideBySide(f"{o.shard}: {o.key}", o.picture, f"{o.kind}, {o.distance} bits", read(o), by_name[o.picture].read())
            for o in islice(doubtful, _SHOWN)
        )
        result = Overlaps(
            evaluation=len(self.evaluation.files),
            broken=self.evaluation.broken,
            pictures=pictures,
            unreadable=unreadable,
            exact=sum(kind == "exact" for kind in kinds.values()),
            near=sum(kind == "near" for kind in kinds.values()),
            found=len({overlap.picture for overlap in overlaps}),
            overlaps=output / "overlaps.jsonl",
            exclude=output / "exclude.jsonl",
            page=output / "overlaps.html",
        )
        _write(result.overlaps, "".join(json.dumps(asdict(overlap)) + "\n" for overlap in overlaps))
        _write(result.exclude, "".join(json.dumps({"shard": shard, "key": key}) + "\n" for shard, key in sorted(kinds)))
        _write(result.page, page(result.lines(), pairs))
        return result


def _hash_shard(index: ShardIndex, storage: Storage, shard: int) -> tuple[np.ndarray, dict[str, Any]]:
    pictures = _hash_pictures(_pictures_of_shard(index, storage, shard))
    return pictures, {"unreadable": int((~pictures["decoded"]).sum())}


def _hash_pictures(pictures: Iterator[bytes]) -> np.ndarray:
    """Encoded pictures in, what they are compared by out."""
    parts = [np.empty(0, dtype=PICTURE)]
    while some := list(islice(pictures, _HASHED_AT_ONCE)):
        hashed = np.zeros(len(some), dtype=PICTURE)
        grays = np.zeros((len(some), 32, 32), dtype=np.uint8)
        for number, data in enumerate(some):
            hashed["digest"][number] = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
            with suppress(BadSample):
                grays[number] = picture_gray(data)
                hashed["decoded"][number] = True
        hashed["hash"] = perceptual_hash(grays)
        parts.append(hashed)
    return np.concatenate(parts)


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


def _write(path: Path, text: str) -> None:
    """Write a file that is whole as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(text.encode(errors="replace"))  # names of files may hold anything
    os.replace(temporary, path)
