"""Hugging Face datasets on disk: folders of `save_to_disk` and Parquet files, memory-mapped as Arrow."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from components.data.sources.base import AS_IN_DATA, BYTES_PER_TOKEN, Overrides, Sample, Source, group_numbers
from components.data.sources.dataset_records import pictures_of, recognize
from components.data.sources.folder import Folder
from components.errors import BadSample, RecipeError
from components.hub import looks_like_hub_id
from components.turns import Turn

Dataset = Any  # of datasets, which is imported where it is used, as pyarrow is
Array = Any  # of pyarrow; so is a Scalar
Scalar = Any
_PREFIX = 4096  # bytes by which pictures are told apart: what is equal up to there and in size is held out together
_AT_ONCE = 10_000
_PICTURE = ("bytes", "path")


class HuggingFaceDataset(Source):
    """A Hugging Face dataset on disk in, samples out: a folder of `save_to_disk`, or Parquet files.

    Records are recognized by their columns: `conversations` as in LLaVA's files; `messages` of chats; `texts` of exchanges as in
    the_cauldron; each with a picture `image` or a list `images` where there are pictures; or `image` with `caption` or `text`.
    Pictures without an `<image>` in the text stand before the first question. JSON and JSONL files are read by LlavaConversations.

    Args:
        path: A folder of `save_to_disk`; a folder of Parquet files; a Parquet file; or a dataset on the hub, `organization/name`.
            Parquet files are copied once into the cache of the library as Arrow (HF_DATASETS_CACHE), which must have room for it.
        split: Which of its splits; null where there is one alone.
        images: Folder that paths of pictures are relative to, where records hold paths; null: the dataset's own.
        follow_links: Whether links inside that folder may lead out of it.
        exclude: File of `python main.py index --against`, with the records that evaluations ask about: they are left out.
        weight: Relative weight in the mixture, >= 0; 0 is not drawn before `data.weight_changes` says so. Null where `epochs` or
            `samples` says how much is drawn.
        epochs: How often a run draws each of its samples, > 0, instead of a weight; to a thousandth of the run.
        samples: How many samples a run draws from it, >= 1, instead of a weight; to a thousandth of the run.
        validation_fraction: Share of the pictures that is never trained on and gives `val/loss`, in [0, 1). All pictures are
            looked at for it at each start.
        overrides: What it prepares otherwise than the rest.

    Source: huggingface.co/docs/datasets, "Load".
    """

    def __init__(
        self,
        path: str,
        split: str | None = None,
        images: str | None = None,
        follow_links: bool = False,
        exclude: str | None = None,
        weight: float | None = 1.0,
        epochs: float | None = None,
        samples: int | None = None,
        validation_fraction: float = 0.0,
        overrides: Overrides = AS_IN_DATA,
    ) -> None:
        super().__init__(weight, epochs, samples, validation_fraction, overrides)
        self.path = path
        self.split = split
        self.images = images
        self.follow_links = follow_links
        self.exclude = exclude

    def open(self) -> UInt64[np.ndarray, " samples"]:
        """Map the files and recognize the records; samples of one picture belong together."""
        # rows as Arrow has them: nothing is decoded, and a column is read when it is asked for
        self.rows = _load(self.path, self.split).with_format("arrow")
        if not len(self.rows):  # as a filter may leave it; the library itself refuses an empty Parquet file
            raise RecipeError(f"{self._name()} holds no record. Name another folder or split.")
        self.layout = recognize(self.rows.column_names, self._name())
        here = Path(self.path)  # nothing of that name where it comes from the hub
        own = here if here.is_dir() else here.parent if here.exists() else None
        folder = self.images or own
        self.folder = Folder(str(folder), self.path, self.follow_links) if folder else None
        self.kept = np.arange(len(self.rows))
        if self.exclude:
            self.kept = np.setdiff1d(self.kept, _excluded(self.exclude, self.short_name, len(self.rows)))
        self.text_bytes = self._of_rows(self.layout.text, _text_bytes)[self.kept]
        self.num_pictures = np.zeros(len(self.kept), dtype=np.int64)
        if self.layout.pictures:
            self.num_pictures = self._of_rows(self.layout.pictures, _num_pictures)[self.kept]
        if not len(self.kept):
            raise RecipeError(
                f"{self._name()}: {self.exclude} leaves none of {len(self.rows)} records. Name another file (exclude)."
            )
        self._parse(0)  # a layout that only looks like one of ours shows before the run starts
        if not self.validation_fraction or not self.layout.pictures:
            return self.kept.astype(np.uint64)
        return group_numbers(self._picture_names(self.layout.pictures))[self.kept]

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """The record at an index."""
        name, turns, _ = self._parse(index)
        try:
            return Sample(name, turns, self.pictures(index))
        except BadSample as error:
            raise BadSample(f"{self.where(index)}, id {name}: {error}") from error

    def pictures(self, index: int) -> list[bytes]:
        """The encoded pictures of the record at an index.

        Raises:
            BadSample: One of them is missing or cannot be read.
        """
        if not self.layout.pictures:
            return []
        return [self._bytes(picture) for picture in pictures_of(self._value(index, self.layout.pictures))]

    def text(self, index: int, random: np.random.Generator) -> tuple[str, list[Turn], int]:
        """The record at an index, without its pictures."""
        return self._parse(index)

    def estimate(self, indices: Int64[np.ndarray, " samples"], tokens_per_image: int) -> Int64[np.ndarray, " samples"]:
        """Estimated from the sizes of the texts."""
        return tokens_per_image * self.num_pictures[indices] + self.text_bytes[indices] // BYTES_PER_TOKEN

    def where(self, index: int) -> str:
        """Folder or file, split and row."""
        return f"{self._name()}, row {self.kept[index]}"

    def describe(self) -> str:
        """Folder or file, split, and what its records are."""
        return f"{self._name()} ({self.layout.name})" if hasattr(self, "layout") else self._name()

    def fingerprint(self) -> str:
        """Name, split, number of records; a digest of which they are, of all texts' sizes, and of the first and the last text."""
        ends = [str(self._value(row, self.layout.text)) for row in (0, len(self.kept) - 1)]
        digest = hashlib.blake2b(self.kept.tobytes() + self.text_bytes.tobytes() + self.num_pictures.tobytes(), digest_size=8)
        digest.update("".join(ends).encode(errors="surrogatepass"))
        return f"{self.short_name}:{len(self.kept)}:{digest.hexdigest()}"

    @property
    def short_name(self) -> str:
        """Folder or file and split, the same wherever it lies."""
        return f"{Path(self.path).name}:{self.split}"

    def id(self, index: int) -> str:
        """The id of the record at an index; its row where it has none."""
        named = self._value(index, "id") if "id" in self.rows.column_names else None
        return str(self.kept[index] if named is None else named)

    def _name(self) -> str:
        return f"{self.path}, split {self.split}" if self.split else self.path

    def _value(self, index: int, column: str) -> Any:
        return self.rows[int(self.kept[index])].column(column)[0].as_py()

    def _parse(self, index: int) -> tuple[str, list[Turn], int]:
        name, number = self.id(index), int(self.num_pictures[index])
        try:
            return name, self.layout.turns(self._value(index, self.layout.text), number), number
        except BadSample as error:
            raise BadSample(f"{self.where(index)}, id {name}: {error}") from error

    def _bytes(self, picture: Any) -> bytes:
        data = picture.get("bytes") if isinstance(picture, dict) else picture
        path = picture.get("path") if isinstance(picture, dict) else picture
        if isinstance(data, bytes):
            return data
        if isinstance(path, str) and self.folder:
            return self.folder.read(path)
        raise BadSample(f"A picture is neither bytes nor a path below a folder (images); it is {str(picture)[:80]}.")

    def _of_rows(self, column: str, measure: Callable[[Array], Int64[np.ndarray, " rows"]]) -> Int64[np.ndarray, " rows"]:
        tables = self.rows.select_columns([column]).iter(_AT_ONCE)
        return np.concatenate([measure(chunk) for table in tables for chunk in table.column(column).chunks])

    def _picture_names(self, column: str) -> Iterator[str]:
        tables = self.rows.select_columns([column]).iter(_AT_ONCE)
        for row, value in enumerate(value for table in tables for value in table.column(column)):
            found = _beginnings(value)
            yield "\0".join(found) if found else f"row {row}"


def _excluded(path: str, name: str, num_rows: int) -> list[int]:
    remedy = "Write it for this dataset: python main.py index --config RECIPE --against FOLDER."
    rows = []
    try:
        for line in Path(path).read_text().splitlines():
            record = json.loads(line)
            shard, row = record["shard"], record["row"]
            if shard != name or type(row) is not int or not 0 <= row < num_rows:
                raise RecipeError(
                    f"{path} (exclude) excludes row {row!r} of {shard!r}; this dataset is {name!r}, with rows 0 to {num_rows - 1}. "
                    f"{remedy}"
                )
            rows.append(row)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} (exclude) is no list of records: {error}. {remedy}") from error
    return rows


def _load(path: str, split: str | None) -> Dataset:
    found = _read(path)
    if not isinstance(found, dict):
        if split is not None:
            raise RecipeError(f"{path} holds one dataset without splits, but split is {split}. Set split to null.")
        return found
    wanted = next(iter(found)) if split is None and len(found) == 1 else split
    if wanted is None or wanted not in found:
        raise RecipeError(
            f"{path} has the splits {', '.join(found)}; split is {'null' if split is None else split}. Name one of them."
        )
    return found[wanted]


def _read(path: str) -> Dataset | dict[str, Dataset]:
    import datasets

    source = Path(path)
    remedy = "Write or fetch it again"
    try:
        if (source / "dataset_dict.json").is_file() or (source / "state.json").is_file():
            return datasets.load_from_disk(path)
        if source.is_dir() and any(source.rglob("*.parquet")):
            return datasets.load_dataset("parquet", data_dir=path)
        if source.is_file() and source.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=path)
        if looks_like_hub_id(path):
            remedy = "It is not on this disk: correct it, or fetch it (hf download --repo-type dataset) and name its folder"
            return datasets.load_dataset(path)
    except Exception as error:  # of Arrow, of the file system, of the hub's HTTP library of the day
        cause = error.__cause__ or error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise RecipeError(f"The dataset {path} cannot be read: {lines[0][:200]}. {remedy}.") from error
    raise RecipeError(
        f"{path} is neither a folder of save_to_disk, nor a Parquet file or a folder of such files. Correct the path of the "
        "source; JSON and JSONL files are read by LlavaConversations."
    )


def _text_bytes(array: Array) -> Int64[np.ndarray, " rows"]:
    """Bytes of all texts in each element of an Arrow array, from the offsets alone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return _numbers(pc.binary_length(array))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = _numbers(pc.list_value_length(array))
        ends = np.cumsum(lengths)
        sums = np.concatenate([[0], np.cumsum(_text_bytes(array.flatten()))])
        return sums[ends] - sums[ends - lengths]
    if pa.types.is_struct(array.type):
        return np.stack([_text_bytes(field) for field in array.flatten()]).sum(axis=0)
    return np.zeros(len(array), dtype=np.int64)


def _num_pictures(array: Array) -> Int64[np.ndarray, " rows"]:
    """Pictures in each element of an Arrow array, without reading them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _numbers(pc.list_value_length(array))
    if pa.types.is_struct(array.type):
        known = [
            _numbers(field.is_valid()) for field, kind in zip(array.flatten(), array.type, strict=True) if kind.name in _PICTURE
        ]
        return np.max(known, axis=0)
    return _numbers(array.is_valid())


def _numbers(array: Array) -> Int64[np.ndarray, " rows"]:
    import pyarrow.compute as pc

    return pc.fill_null(pc.cast(array, "int64"), 0).to_numpy(zero_copy_only=False)


def _beginnings(value: Scalar) -> list[str]:
    """What tells pictures apart: their paths, or sizes and first bytes; only those pages of the file are read."""
    import pyarrow as pa

    if not value.is_valid:
        return []
    if pa.types.is_list(value.type) or pa.types.is_large_list(value.type):
        return [name for item in value.values for name in _beginnings(item)]
    if pa.types.is_struct(value.type):
        return next((name for field in _PICTURE if field in value and (name := _beginnings(value[field]))), [])
    if pa.types.is_string(value.type):
        return [value.as_py()]
    data = value.as_buffer()
    return [f"{data.size} {data.slice(0, min(_PREFIX, data.size)).to_pybytes().hex()}"]
