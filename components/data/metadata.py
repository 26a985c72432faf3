"""What img2dataset knows of the samples of a shard: `NAME.parquet` beside it, else the .json members inside it.

Source: github.com/rom1504/img2dataset, README (output format) and writer.py.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float64

from components.errors import RecipeError
from components.shards.names import is_remote
from components.shards.one_shard import Pieces
from components.shards.rows import ShardIndex
from components.shards.sample import MAX_JSON_BYTES, hash_key, split_name
from components.shards.storage import Storage
from components.shards.tar import Member, walk

Result = TypeVar("Result")
Number = float | int | None
"""A number, or the hash of a text; None where there is none."""
Columns = Mapping[str, Callable[[Any], Number]]
"""Names of columns in small letters, each with what makes a number of a value."""
Record = tuple[Any, dict[str, Any]]
"""Key and values of one sample."""


@dataclass(frozen=True)
class Metadata:
    """Columns of a shard, in the order of its samples; None where a sample has no value.

    Args:
        columns: Values by the column's name; a column that the shard does not have is not there.
        num_samples: Samples of the shard.
    """

    columns: dict[str, list[Number]]
    num_samples: int

    def values(self, column: str) -> list[Number]:
        """The values of a column."""
        return self.columns.get(column, [None] * self.num_samples)

    def numbers(self, column: str) -> Float64[np.ndarray, " samples"]:
        """The values of a column as an array; NaN where there is none."""
        return np.array(self.values(column), dtype=np.float64)


def number(value: Any) -> Number:
    """A value of the metadata as a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def text_hash(value: Any) -> Number:
    """The hash of a text of the metadata, such as a URL."""
    try:
        return hash_key(value.strip())
    except (AttributeError, UnicodeEncodeError):  # no text; or one with half of a surrogate pair, as JSON may escape it
        return None


def digest_hash(value: Any) -> Number:
    """The hash of a digest of the metadata, which may be written in capitals."""
    return text_hash(value.lower()) if isinstance(value, str) else None


def version_of(index: ShardIndex, shard: int, storage: Storage) -> list[int | str] | None:
    """Which version of its metadata a shard has: size, and time of change or ETag, of the file that they are read from.

    Raises:
        RecipeError: Every attempt to learn it failed.
    """
    if not index.sizes[shard]:  # perhaps it cannot be read at all
        return None
    url = index.names[shard]
    return list(_optional(url, ".parquet", storage.identity) or storage.identity(url))


def metadata_of(index: ShardIndex, shard: int, columns: Columns, storage: Storage) -> Metadata:
    """Some columns of a shard's metadata.

    Args:
        index: The index of the shards.
        shard: The shard's number.
        columns: Those that are wanted.
        storage: Reads the shards.

    Raises:
        RecipeError: The metadata cannot be read.
    """
    url = index.names[shard]
    keys = index.rows(shard)["key"]
    if not len(keys):  # perhaps it cannot be read at all
        return Metadata({}, 0)
    data = beside(url, ".parquet", storage)
    hashes, found, there = [], {column: list[Number]() for column in columns}, set[str]()
    for key, record in _of_members(url, columns, storage) if data is None else _of_parquet(url, data, columns):
        if isinstance(key, str):
            hashes.append(hash_key(key))
            there.update(record)
            for column, convert in columns.items():
                found[column].append(convert(record.get(column)))
    if not hashes:
        return Metadata({}, len(keys))
    theirs = np.array(hashes, dtype=np.uint64)
    order = np.argsort(theirs, kind="stable")
    places = np.minimum(np.searchsorted(theirs, keys, sorter=order), len(theirs) - 1)
    known = theirs[order[places]] == keys
    return Metadata(
        {
            column: [values[order[place]] if here else None for place, here in zip(places, known, strict=True)]
            for column, values in found.items()
            if column in there
        },
        len(keys),
    )


def beside(url: str, ending: str, storage: Storage) -> bytes | None:
    """The file beside a shard that has the shard's name with another ending; None where there is none."""
    return _optional(url, ending, lambda name: storage.read(name, 0, storage.size(name)))


def _optional(url: str, ending: str, read: Callable[[str], Result]) -> Result | None:
    if not url.endswith(".tar"):
        return None
    name = f"{url.removesuffix('.tar')}{ending}"
    try:
        return read(name)
    except RecipeError as error:
        cause = error.__cause__
        status = getattr(cause, "status", None)
        if isinstance(cause, FileNotFoundError) or status in (404, 410):
            return None
        if is_remote(name) and (isinstance(cause, PermissionError) or status == 403):
            return None  # so a store answers, for what is not there, those who may not list its files
        raise


def _of_parquet(url: str, data: bytes, columns: Columns) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _broken(url, error) from error
    schema = table.schema_arrow
    names = {name.lower(): name for name in reversed(schema.names)}
    kind = schema.field(names["key"]).type if "key" in names else "nothing: there is none"
    if "key" not in names or pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind):
        raise RecipeError(
            f"The .parquet beside {url} does not say which samples its rows are about: its column key holds {kind}, not texts. "
            f"It has the columns {', '.join(names)}. Restore img2dataset's, or remove the file."
        )
    wanted = {column: names[column] for column in columns if column in names}
    try:
        for batch in table.iter_batches(columns=list({names["key"], *wanted.values()})):
            for record in batch.to_pylist():
                yield record[names["key"]], {column: record[name] for column, name in wanted.items()}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _broken(url, error) from error


def _broken(url: str, error: Exception) -> RecipeError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return RecipeError(f"The .parquet beside {url}, img2dataset's metadata, cannot be read: {reason}. Restore it or remove it.")


def _of_members(url: str, columns: Columns, storage: Storage) -> Iterator[Record]:
    """What the .json members of a shard say of their samples."""
    size = storage.size(url)
    # of a file on this machine the pictures need not be read
    read = Pieces(storage, url, size) if is_remote(url) else partial(storage.read, url)
    for member in walk(read, size):
        if isinstance(member, Member) and split_name(member.name)[1] == "json" and member.size <= MAX_JSON_BYTES:
            try:
                record = json.loads(read(member.offset, member.size))
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                lower = {name.lower(): value for name, value in reversed(record.items())}
                yield split_name(member.name)[0], {column: lower[column] for column in columns if column in lower}
