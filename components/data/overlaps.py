"""Comparing training pictures with those of evaluations: what hashes suggest, and the pictures themselves confirm.

Which copies are found, as shares of the 200 photographic pictures of PAIRS (github.com/katiefraser/PAIRS; `python -m
tests.benchmarks decontamination FOLDER`). 8 bits are the default: among 2 x 10^8 pairs of unrelated pictures no hash is as near,
and with 10 bits a look-up takes three times as long.

| copy | 2 bits | 4 bits | 6 bits | 8 bits | 10 bits |
|---|---|---|---|---|---|
| quality 50 to 95, half or double size, squashed, gray | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |
| 20 % brighter | 0.950 | 0.990 | 1.000 | 1.000 | 1.000 |
| 2 % of width and height cut off | 0.655 | 0.920 | 1.000 | 1.000 | 1.000 |
| 5 % of width and height cut off | 0.225 | 0.600 | 0.825 | 0.935 | 0.985 |
| 10 % of width and height cut off | 0.000 | 0.030 | 0.130 | 0.255 | 0.340 |
| mirrored | 0.000 | 0.000 | 0.000 | 0.000 | 0.000 |

Drawings of one layout, such as diagrams, are near one another although they differ in what is asked; fewer bits part more of them.
Of symmetric drawings many frequencies are equal, so a recompressed copy may be missed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from components.atomic import save
from components.data.evaluation_pictures import EvaluationPictures
from components.data.overlap_page import SideBySide, page
from components.errors import BadSample
from components.perceptual_hash import SIDE, HashTable, perceptual_hash, picture_gray, same_picture

PICTURE = np.dtype([("digest", "<u8"), ("hash", "<u8"), ("decoded", "?")])
"""A training picture: the first 8 bytes of the SHA-256 of its file, its perceptual hash, and whether it could be decoded."""
HASHED_AT_ONCE = 256
_MOST = 16  # overlaps that are listed of one training picture, nearest first
_SHOWN = 60
_MANY, _MANY_TIMES = 100, 10  # more near ones than this, and than so many times the exact ones, are doubtful


@dataclass(frozen=True)
class Overlap:
    """A training picture that an evaluation asks about.

    Args:
        shard: The shard by its name in the index, or the annotation file.
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
        page: HTML page that shows some of them.
        without: File by which a recipe trains without them.
        remedy: How the source of the recipe names it.
    """

    evaluation: int
    broken: list[str]
    pictures: int
    unreadable: int
    exact: int
    near: int
    found: int
    overlaps: Path
    page: Path
    without: Path
    remedy: str

    def lines(self) -> list[str]:
        """The result in a few lines for the terminal."""
        lines = [
            f"{self.exact + self.near:,} training samples show {self.found:,} of {self.evaluation:,} evaluation pictures: "
            f"{self.exact:,} exact, {self.near:,} near. {self.pictures:,} training pictures were compared.",
            f"All: {self.overlaps}. Some side by side: {self.page}. To train without them: {self.remedy}",
        ]
        if self.near > _MANY and self.near > _MANY_TIMES * self.exact:
            lines.append(
                f"{self.near:,} near are many more than {self.exact:,} exact: drawings of one layout look alike. Look at "
                f"{self.page}; a smaller --distance finds fewer."
            )
        if self.unreadable:
            lines.append(f"{self.unreadable:,} training pictures cannot be decoded; their bytes alone were compared.")
        if self.broken:
            lines.append(f"{len(self.broken):,} evaluation pictures cannot be decoded and were not looked for:")
            lines += [f"  {line}" for line in self.broken[:10]] + [f"  and {len(self.broken) - 10:,} others"] * (
                len(self.broken) > 10
            )
        return lines


class Match(NamedTuple):
    """A training picture by its number, and the evaluation's that it is like."""

    row: int
    found: int
    kind: Literal["exact", "near"]
    distance: int


class Search:
    """The evaluations' pictures, as training pictures are compared with them."""

    def __init__(self, evaluation: EvaluationPictures, distance: int) -> None:
        self.evaluation = evaluation
        # equal small pictures are compared once: of blank ones there may be thousands
        flat = np.ascontiguousarray(evaluation.grays).reshape(-1).view(f"V{SIDE * SIDE}")
        _, self.firsts, group = np.unique(flat, return_index=True, return_inverse=True)
        self.groups = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
        self.table = HashTable(evaluation.hashes[self.firsts], distance)
        starts = np.ascontiguousarray(evaluation.digests[:, :8]).view("<u8")[:, 0]
        self.order = np.argsort(starts, kind="stable")
        self.starts = starts[self.order]

    def matches(self, pictures: np.ndarray, read: Callable[[int], bytes]) -> tuple[list[Match], set[int]]:
        """Hashed training pictures in, their matches out: what the hashes suggest is confirmed by the pictures themselves.

        Of each picture the nearest 16 are listed; the numbers of all evaluation pictures that are found come beside.
        """
        evaluation = self.evaluation
        first = np.searchsorted(self.starts, pictures["digest"])
        last = np.searchsorted(self.starts, pictures["digest"], side="right")
        decoded = np.flatnonzero(pictures["decoded"])
        query, near, distances = self.table.search(pictures["hash"][decoded])
        candidates: dict[int, list[tuple[int, int]]] = {int(row): [] for row in np.flatnonzero(last > first)}
        for row, group, distance in zip(decoded[query].tolist(), near.tolist(), distances.tolist(), strict=True):
            candidates.setdefault(row, []).append((distance, group))
        matches, groups, all_found = list[Match](), set[int](), set[int]()
        for row, others in sorted(candidates.items()):
            data = read(row)
            digest = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
            candidate = self.order[first[row] : last[row]]
            equal = candidate[(evaluation.digests[candidate] == digest).all(axis=1)]
            all_found.update(equal.tolist())
            of_row = [Match(row, found, "exact", 0) for found in equal[:_MOST].tolist()]
            if others:
                others.sort()
                gray = np.broadcast_to(picture_gray(data), (len(others), SIDE, SIDE))
                alike = same_picture(gray, evaluation.grays[self.firsts[[group for _, group in others]]])
                for distance, group in [other for other, yes in zip(others, alike, strict=True) if yes]:
                    groups.add(group)
                    if len(of_row) < _MOST:
                        rest = np.setdiff1d(self.groups[group], equal)[:_MOST].tolist()
                        of_row += [Match(row, found, "near", distance) for found in rest]
            matches += of_row[:_MOST]
        return matches, all_found.union(*(self.groups[group].tolist() for group in groups))

    def overlap(self, shard: str, key: str, match: Match) -> Overlap:
        """A match with names."""
        return Overlap(shard, key, match.row, self.evaluation.files[match.found].name, match.kind, match.distance)

    def write(
        self,
        overlaps: list[Overlap],
        read: Callable[[Overlap], bytes],
        output: Path,
        without: str,
        remedy: str,
        pictures: int,
        unreadable: int,
        found: int,
    ) -> Overlaps:
        """Write what was found, and a page of those that are least alike.

        Args:
            overlaps: All of them.
            read: The training picture of an overlap.
            output: Folder of the files.
            without: Name of the file by which a recipe trains without them, which is the caller's to write.
            remedy: How the source of the recipe names that file, with {} for its path.
            pictures: Training pictures that were compared.
            unreadable: Those that could not be decoded.
            found: Evaluation pictures of which there is a copy, listed or not.
        """
        overlaps = sorted(
            overlaps, key=lambda overlap: (overlap.shard, overlap.row, overlap.kind, overlap.distance, overlap.picture)
        )
        kinds = Counter(
            {(overlap.shard, overlap.row): overlap.kind for overlap in reversed(overlaps)}.values()
        )  # exact comes first
        by_name = {file.name: file for file in self.evaluation.files}
        result = Overlaps(
            evaluation=len(self.evaluation.files),
            broken=self.evaluation.broken,
            pictures=pictures,
            unreadable=unreadable,
            exact=kinds["exact"],
            near=kinds["near"],
            found=found,
            overlaps=output / "overlaps.jsonl",
            page=output / "overlaps.html",
            without=output / without,
            remedy=remedy.format(output / without),
        )
        pairs = (
            SideBySide(f"{o.shard}: {o.key}", o.picture, f"{o.kind}, {o.distance} bits", read(o), by_name[o.picture].read())
            for o in sorted(overlaps, key=lambda overlap: -overlap.distance)[:_SHOWN]
        )
        write_lines(result.overlaps, (json.dumps(asdict(overlap)) for overlap in overlaps))
        write_lines(result.page, [page(result.lines(), pairs)])
        return result


def hash_pictures(pictures: Iterator[bytes]) -> np.ndarray:
    """Encoded pictures in, what they are compared by out."""
    parts = [np.empty(0, dtype=PICTURE)]
    while some := list(islice(pictures, HASHED_AT_ONCE)):
        hashed = np.zeros(len(some), dtype=PICTURE)
        grays = np.zeros((len(some), SIDE, SIDE), dtype=np.uint8)
        for number, data in enumerate(some):
            hashed["digest"][number] = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
            with suppress(BadSample):
                grays[number] = picture_gray(data)
                hashed["decoded"][number] = True
        hashed["hash"] = perceptual_hash(grays)
        parts.append(hashed)
    return np.concatenate(parts)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file of lines that is whole as soon as it is there."""
    save(path, lambda file: file.writelines(f"{line}\n".encode(errors="replace") for line in lines))  # names may hold anything
