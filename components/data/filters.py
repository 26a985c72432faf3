"""Filters: which samples of a shard are trained on, decided once, shard by shard, from the index and img2dataset's metadata."""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt32, UInt64

from components.data.metadata import Metadata, Number, digest_hash, metadata_of, number, text_hash, version_of
from components.data.shard_files import ShardFiles, save_array, save_facts, whole
from components.data.sources.base import uniform
from components.errors import RecipeError
from components.shards.names import names_in_index
from components.shards.rows import ShardIndex
from components.shards.sample import hash_key
from components.shards.storage import Storage

KIND = "select"
DROPPED, TRAIN, VALIDATION = range(3)
"""What a sample is used for."""
_AGAINST = "Write the file (filters.exclude) for these shards: python main.py index --config RECIPE --against FOLDER."
_HEX = re.compile("[0-9a-fA-F]+")
_DIGESTS = {32: "md5", 64: "sha256"}
"""Columns of img2dataset's metadata by the number of their hexadecimal digits."""
Mask = Bool[np.ndarray, " samples"]


@dataclass(frozen=True)
class Filters:
    """Which samples are used; what is null filters nothing.

    Args:
        min_characters: Least characters of a caption, >= 1.
        max_characters: Most characters of a caption, up to 65534.
        min_side: Least pixels of the picture's shorter side, >= 1.
        max_aspect: Most that a picture's longer side may be of its shorter one, >= 1.
        scores: Columns of img2dataset's metadata with the least and the most that a sample may have there, such as
            `{similarity: [0.28, null], punsafe: [null, 0.5], pwatermark: [null, 0.8]}`; null is an open end. Without regard to
            capitals. A sample without a score is dropped.
        blocklist: Text file with what must not be used, one a line: URLs, or the sha256 or md5 of the files in hexadecimal digits,
            as img2dataset's metadata have them. A sample of which that is not known is dropped.
        exclude: File of `python main.py index --against`, with the samples that evaluations ask about.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    min_side: int | None = None
    max_aspect: float | None = None
    scores: dict[str, tuple[float | None, float | None]] | None = None
    blocklist: str | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        for name, least, most in (("characters", self.min_characters, self.max_characters), ("side", self.min_side, None)):
            if least is not None and (least < 1 or (most is not None and most < least)):
                raise RecipeError(f"filters: min_{name} = {least} must be at least 1 and at most max_{name} = {most}.")
        if self.max_characters is not None and not 1 <= self.max_characters <= 65534:
            raise RecipeError(f"filters: max_characters = {self.max_characters} must be from 1 to 65534, all that an index counts.")
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise RecipeError(f"filters: max_aspect = {self.max_aspect} must be at least 1, which is a square.")
        for column, (least_score, most_score) in (self.scores or {}).items():
            if least_score is None and most_score is None:
                raise RecipeError(f"filters: scores.{column} has neither end. State one, or leave the column out.")
            ends = [end for end in (least_score, most_score) if end is not None]
            if not ends[0] <= ends[-1]:  # so it is with NaN, too
                raise RecipeError(f"filters: scores.{column} = {ends} leaves nothing. State the least first, then the most.")

    @property
    def any(self) -> bool:
        """Whether there is anything to filter by."""
        return any(value is not None for value in asdict(self).values())

    def hash(self, validation_fraction: float) -> str:
        """Changes when other samples would be used: of the filters, the files that they name, and the share that is held out."""
        files = [_digest(path, key) for key, path in (("blocklist", self.blocklist), ("exclude", self.exclude)) if path]
        stated = {key: value for key, value in asdict(self).items() if key not in ("blocklist", "exclude")}
        text = json.dumps([stated, validation_fraction, bool(self.blocklist), bool(self.exclude)], sort_keys=True)
        return hashlib.blake2b(b"".join([*files, text.encode()]), digest_size=8).hexdigest()


NO_FILTERS = Filters()


class Select:
    """A shard's number in, what each of its samples is used for out, with how many were dropped for which reason.

    Args:
        index: The index of the shards.
        filters: The filters.
        validation_fraction: Share of the samples that is held out, in [0, 1).
        storage: Reads the shards.
    """

    def __init__(self, index: ShardIndex, filters: Filters, validation_fraction: float, storage: Storage) -> None:
        self.index, self.filters, self.validation_fraction, self.storage = index, filters, validation_fraction, storage
        self.blocked = _Blocked(filters.blocklist) if filters.blocklist else None
        self.names = names_in_index(index.names)
        self.excluded = _excluded(filters.exclude) if filters.exclude else {}
        if unknown := sorted(self.excluded.keys() - set(self.names)):
            raise RecipeError(
                f"{filters.exclude} excludes samples of a shard {unknown[0]}, which the index {index.folder} lacks. {_AGAINST}"
            )
        self.columns: dict[str, Callable[[Any], Number]] = {column.lower(): number for column in filters.scores or {}}
        if self.blocked:
            self.columns |= {column: text_hash if column == "url" else digest_hash for column in self.blocked.entries}

    def version(self, shard: int) -> list[int | str] | None:
        """Which version of its metadata decides over a shard."""
        return version_of(self.index, shard, self.storage) if self.columns else None

    def __call__(self, shard: int) -> tuple[UInt8[np.ndarray, " samples"], dict[str, Any]]:
        """The use of every sample of a shard; a sample that several filters drop is counted for the first of them."""
        rows = self.index.rows(shard)
        kept, dropped = np.ones(len(rows), dtype=bool), Counter[str]()

        def drop(mask: Mask, reason: str) -> None:
            dropped[reason] += int((mask & kept).sum())
            kept[mask] = False

        filters = self.filters
        excluded = self.excluded.get(self.names[shard])
        if excluded is not None and len(rows):  # it has none where it cannot be read now
            if missing := int(np.isin(excluded, rows["key"], invert=True).sum()):
                raise RecipeError(
                    f"{filters.exclude}: {missing} of {len(excluded)} keys that it excludes of shard {self.names[shard]} are not "
                    f"there. {_AGAINST}"
                )
            drop(np.isin(rows["key"], excluded), "excluded")
        if filters.min_characters is not None:
            drop(rows["characters"] < filters.min_characters, "caption too short")
        if filters.max_characters is not None:
            drop(rows["characters"] > filters.max_characters, "caption too long")
        sides = np.sort(np.stack([rows["width"], rows["height"]], dtype=np.int64), axis=0)
        if filters.min_side is not None:
            drop(sides[0] < filters.min_side, "picture too small")
        if filters.max_aspect is not None:
            drop(sides[1] > filters.max_aspect * sides[0], "picture too long")
        columns: list[str] = []
        if self.columns:
            metadata = metadata_of(self.index, shard, self.columns, self.storage)
            columns = list(metadata.columns)
            if self.blocked:
                blocked, unknown = self.blocked.masks(metadata)
                drop(blocked, "on the blocklist")
                drop(unknown, "blocklist: URL or hash unknown")
            for column, (least, most) in (filters.scores or {}).items():
                scores = metadata.numbers(column.lower())
                drop(np.isnan(scores), f"{column} unknown")
                if least is not None:
                    drop(scores < least, f"{column} below {least:g}")
                if most is not None:
                    drop(scores > most, f"{column} above {most:g}")
        held_out = kept & (uniform(rows["key"]) < self.validation_fraction)
        uses = np.where(kept, np.where(held_out, VALIDATION, TRAIN), DROPPED).astype(np.uint8)
        counts = {"train": int((uses == TRAIN).sum()), "validation": int(held_out.sum())}
        return uses, {**counts, "dropped": {reason: count for reason, count in dropped.items() if count}, "columns": columns}


@dataclass(frozen=True)
class Selection:
    """What the samples of an index are used for, as `python main.py index` has decided it.

    Args:
        files: What each sample of a shard is used for.
        train: Samples to train on in each shard.
        held_out: Numbers of the samples that are held out, counted over all shards.
        dropped: How many samples were dropped for which reason.
    """

    files: ShardFiles
    train: Int64[np.ndarray, " shards"]
    held_out: Int64[np.ndarray, " held_out"]
    dropped: dict[str, int]

    def rows_to_train_on(self, shard: int) -> UInt32[np.ndarray, " rows"]:
        """Rows of a shard that are trained on, in ascending order."""
        return self.files.array(shard, _trained)


def select(index: ShardIndex, filters: Filters, validation_fraction: float, storage: Storage, processes: int) -> None:
    """Decide what each sample is used for, in all shards for which this has not been done, and write it beside the index.

    Raises:
        RecipeError: A column that no shard has, or a file that cannot be read.
    """
    files = ShardFiles(index, KIND, filters.hash(validation_fraction))
    work = Select(index, filters, validation_fraction, storage)
    facts = files.make(work, processes, "filters", work.version)
    _demand_columns(work.columns, {column for known in facts for column in known["columns"]}, index)
    dropped = Counter[str]()
    for known in facts:
        dropped.update(known["dropped"])
    starts = np.concatenate([[0], np.cumsum(index.sizes)])
    held_out = [
        starts[shard] + np.flatnonzero(np.load(files.path(shard, "npy")) == VALIDATION)
        for shard, known in enumerate(facts)
        if known["validation"]
    ]
    save_array(files.of_all("train.npy"), np.array([known["train"] for known in facts], dtype=np.int64))
    save_array(files.of_all("held_out.npy"), np.concatenate([np.empty(0, dtype=np.int64), *held_out]))
    held_out_size = sum(known["validation"] for known in facts)
    summary = {"index": index.fingerprint, "dropped": dict(dropped.most_common()), "held_out": held_out_size}
    save_facts(files.of_all("json"), summary)


def open_selection(index: ShardIndex, filters: Filters, validation_fraction: float) -> Selection | None:
    """What was decided for these filters and this index; None where nothing was, or it is damaged."""
    files = ShardFiles(index, KIND, filters.hash(validation_fraction))
    summary = files.summary()
    if summary is None:
        return None
    train = whole(files.of_all("train.npy"), len(index.names))
    held_out = whole(files.of_all("held_out.npy"), summary["held_out"])
    if train is None or held_out is None:
        return None
    return Selection(files, train, held_out, summary["dropped"])


class _Blocked:
    """A list of URLs and digests in, which samples are on it out. Eight bytes an entry; up to three times as much to sort them."""

    def __init__(self, path: str) -> None:
        entries: dict[str, array[int]] = {}
        for place, line in _lines(path, "blocklist"):
            if not (entry := line.strip()):
                continue
            column = "url" if "://" in entry else _DIGESTS.get(len(entry)) if _HEX.fullmatch(entry) else None
            if column is None:
                raise RecipeError(
                    f"{path} line {place}: {entry[:80]!r} is neither a URL nor a md5 or sha256 in hexadecimal digits. "
                    "A blocklist (filters.blocklist) has one of them a line."
                )
            entries.setdefault(column, array("Q")).append(hash_key(entry if column == "url" else entry.lower()))
        self.entries = {column: np.unique(np.frombuffer(hashes, dtype=np.uint64)) for column, hashes in entries.items()}

    def masks(self, metadata: Metadata) -> tuple[Mask, Mask]:
        """The samples that are on the list, and those of which that is not known."""
        blocked, unknown = np.zeros((2, metadata.num_samples), dtype=bool)
        for column, hashes in self.entries.items():
            values = metadata.values(column)
            known = np.array([value is not None for value in values], dtype=bool)
            blocked[known] |= np.isin(np.array([value for value in values if value is not None], dtype=np.uint64), hashes)
            unknown |= ~known
        return blocked, unknown


def _excluded(path: str) -> dict[str, UInt64[np.ndarray, " keys"]]:
    """The keys that a file of decontamination names, by the shard's name in the index."""
    keys: dict[str, list[int]] = {}
    for place, line in _lines(path, "exclude"):
        try:
            record = json.loads(line)
            keys.setdefault(record["shard"], []).append(hash_key(record["key"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RecipeError(f"{path} line {place} is not a JSON object with shard and key: {line[:80]!r}. {_AGAINST}") from error
    return {shard: np.array(hashes, dtype=np.uint64) for shard, hashes in keys.items()}


def _digest(path: str, key: str) -> bytes:
    with _opened(path, key) as file:
        return hashlib.file_digest(file, "sha256").digest()


def _lines(path: str, key: str) -> Iterator[tuple[int, str]]:
    with _opened(path, key) as file:
        for place, line in enumerate(file, start=1):
            yield place, line.decode(errors="replace").rstrip("\r\n")


@contextmanager
def _opened(path: str, key: str) -> Iterator[BufferedReader]:
    try:
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise RecipeError(
            f"filters.{key}: {path} cannot be read ({error.strerror}). Correct the path or remove the key."
        ) from error


def _demand_columns(wanted: Iterable[str], found: set[str], index: ShardIndex) -> None:
    if missing := [column for column in wanted if column not in found]:
        raise RecipeError(
            f"filters: no shard of {index.names[0]} and those beside it has a column {' or '.join(missing)}, neither in its "
            ".parquet nor in its .json members, so every sample would be dropped. Correct the name (filters.scores), or run "
            "img2dataset with --save_additional_columns (scores) or --compute_hash (a blocklist of hashes)."
        )


def _trained(uses: UInt8[np.ndarray, " samples"]) -> UInt32[np.ndarray, " rows"]:
    return np.flatnonzero(uses == TRAIN).astype(np.uint32)
