"""What img2dataset knows of the samples of a shard: `NAME.parquet` beside it, else the .json members inside it.

Source: github.com/rom1504/img2dataset, README (output format) and writer.py.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float64

from components.errors import RecipeError
from components.shards.names import is_remote
from components.shards.one_shard import Pieces
from components.shards.rows import ShardIndex
from components.shards.sample import MAX_JSON_BYTES, hash_key, split_name
from components.shards.storage import Storage
from components.shards.tar import Member, walk


@dataclass(frozen=True)
class Metadata:
    """Columns of a shard, in the order of its samples; None where a sample has no value.

    Args:
        columns: Values by the column's name in small letters; a column that the shard does not have is not there.
        num_samples: Samples of the shard.
    """

    columns: dict[str, list[Any]]
    num_samples: int

    def values(self, column: str) -> list[Any]:
        """The values of a column."""
        return self.columns.get(column, [None] * self.num_samples)

    def numbers(self, column: str) -> Float64[np.ndarray, " samples"]:
        """The values of a column as numbers; NaN where there is none."""
        return np.array([_number(value) for value in self.values(column)], dtype=np.float64)


def metadata_of(index: ShardIndex, shard: int, columns: list[str], storage: Storage) -> Metadata:
    """Some columns of a shard's metadata.

    Args:
        index: The index of the shards.
        shard: The shard's number.
        columns: Names in small letters.
        storage: Reads the shards.

    Raises:
        RecipeError: The metadata cannot be read.
    """
    url = index.names[shard]
    keys = index.rows(shard)["key"]
    found = _of_parquet(url, columns, storage)
    if found is None:
        found = _of_members(url, columns, storage)
    theirs = np.array([hash_key(key) for key in found.pop("key", [])], dtype=np.uint64)
    if not len(theirs):
        return Metadata({}, len(keys))
    order = np.argsort(theirs, kind="stable")
    places = np.minimum(np.searchsorted(theirs, keys, sorter=order), len(theirs) - 1)
    known = theirs[order[places]] == keys
    return Metadata(
        {
            name: [values[order[place]] if here else None for place, here in zip(places, known, strict=True)]
            for name, values in found.items()
        },
        len(keys),
    )


def beside(url: str, ending: str, storage: Storage) -> bytes | None:
    """The file beside a shard that has the shard's name with another ending; None where there is none."""
    if not url.endswith(".tar"):
        return None
    name = f"{url.removesuffix('.tar')}{ending}"
    try:
        return storage.read(name, 0, storage.size(name))
    except RecipeError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
            return None
        raise


def _of_parquet(url: str, columns: list[str], storage: Storage) -> dict[str, list[Any]] | None:
    data = beside(url, ".parquet", storage)
    if data is None:
        return None
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        names = {name.lower(): name for name in reversed(table.schema_arrow.names)}
        if "key" not in names:
            raise RecipeError(
                f"The .parquet beside {url} has no column key, so nothing says which samples its rows are about. "
                f"It has {', '.join(names)}. Restore img2dataset's, or remove the file."
            )
        wanted = {column: names[column] for column in ("key", *columns) if column in names}
        read = table.read(columns=list(wanted.values()))
    except pyarrow.ArrowException as error:
        raise RecipeError(
            f"The .parquet beside {url}, img2dataset's metadata, cannot be read: {error}. Restore it or remove it."
        ) from error
    return {column: read.column(name).to_pylist() for column, name in wanted.items()}


def _of_members(url: str, columns: list[str], storage: Storage) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"key": []}
    for key, record in _records(url, storage):
        found["key"].append(key)
        lower = {name.lower(): value for name, value in reversed(record.items())}
        for column in columns:
            if column in lower:
                found.setdefault(column, [None] * (len(found["key"]) - 1)).append(lower[column])
            elif column in found:
                found[column].append(None)
    return found


def _records(url: str, storage: Storage) -> Iterator[tuple[str, dict[str, Any]]]:
    """The .json members of a shard with the keys of their samples."""
    size = storage.size(url)
    # of a file on this machine the pictures need not be read
    read = Pieces(storage, url, size) if is_remote(url) else partial(storage.read, url)
    for member in walk(read, size):
        if isinstance(member, Member) and split_name(member.name)[1] == "json" and member.size <= MAX_JSON_BYTES:
            try:
                record = json.loads(read(member.offset, member.size))
            except ValueError:
                continue
            if isinstance(record, dict):
                yield split_name(member.name)[0], record


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
