"""Token lengths, measured once: what each sample becomes under a tokenizer, a template and a number of visual tokens."""

import hashlib
import json
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt
from transformers import PreTrainedTokenizerBase

from components.annotations import cache_folder
from components.batch import SampleFormat
from components.chat_template import resolve_template
from components.data.histograms import Counts
from components.data.preparation import Preparation
from components.data.shard_files import ShardFiles, in_parallel, save_array, save_facts, whole
from components.data.sources.base import Source
from components.data.sources.tar_shards import TarShards, by_shard
from components.errors import BadSample
from components.shards.names import is_remote
from components.shards.one_shard import Pieces
from components.shards.storage import Storage

KIND = "tokens"
UNUSABLE = 0
"""Length of a sample whose text cannot be used."""
_CHUNK = 2000
"""Samples of a file that a process measures at once."""
Lengths = UInt[np.ndarray, " samples"]


@dataclass
class Measure:
    """Samples of a source in, how many tokens each of them becomes out; no picture is read.

    Args:
        source: The source, set up.
        preparation: How its samples become documents.
        tokenizer: The decoder's tokenizer.
        layout: What the model expects.
    """

    source: Source
    preparation: Preparation
    tokenizer: PreTrainedTokenizerBase
    layout: SampleFormat

    @property
    def hash(self) -> str:
        """Changes when the lengths may change: by tokenizer, template, visual tokens or `max_length`."""
        tokenizer = self.tokenizer
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
        for passing in ("truncation", "padding"):  # of the call before, not of the tokenizer
            backend.pop(passing, None)
        decisive = [
            backend,
            dict(tokenizer.special_tokens_map),
            str(resolve_template(self.preparation.template, tokenizer)),
            self.layout.tokens_per_image,
            self.preparation.max_length,
        ]
        return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=8).hexdigest()

    def of(self, first: int, end: int) -> Lengths:
        """The lengths of the samples from one index up to another."""
        dtype = np.uint16 if self.preparation.max_length <= np.iinfo(np.uint16).max else np.uint32
        return np.array([self._length(index) for index in range(first, end)], dtype=dtype)

    def _length(self, index: int) -> int:
        try:
            _, turns, num_images = self.source.text(index, np.random.default_rng(0))
            ids, _, _ = self.preparation.encode(turns, num_images, self.tokenizer, self.layout)
        except BadSample:
            return UNUSABLE
        return len(ids)


def measure(work: Measure, processes: int, label: str) -> Counts:
    """Measure what has not been measured, and keep it where training looks for it; how often each length occurs out.

    Args:
        work: What to measure.
        processes: Processes that share the work, >= 1.
        label: Name of the source in the progress bar.
    """
    source = work.source
    if isinstance(source, TarShards):
        files = _shard_files(source, work.hash)
        facts = files.make(_OfShard(work), processes, f"{label}: lengths")
        save_facts(files.of_all("json"), {"index": files.index.fingerprint})
        return sum(
            in_parallel(_CountsOfShard(files), range(len(facts)), processes, f"{label}: lengths"), Counts.of(np.empty(0, int))
        )
    path, size = _file(source, work.hash), _size(source)
    if whole(path, size) is None:
        chunks = range(-(-size // _CHUNK))
        parts = list(in_parallel(_OfChunk(work, size), chunks, processes, f"{label}: lengths", f"{_CHUNK} samples"))
        save_array(path, np.concatenate(parts))
    return Counts.of(np.load(path))


def open_lengths(work: Measure) -> "MeasuredShards | MeasuredFile | None":
    """What was measured for this source, as `Source.measured` has it; None where nothing was, or it is damaged."""
    source = work.source
    if not source.fixed_text:
        return None
    if isinstance(source, TarShards):
        files = _shard_files(source, work.hash)
        return MeasuredShards(files, source.starts) if files.summary() is not None else None
    path = _file(source, work.hash)
    return MeasuredFile(path) if whole(path, _size(source)) is not None else None


@dataclass
class MeasuredShards:
    """Indices of samples in shards in, their lengths out."""

    files: ShardFiles
    starts: Int64[np.ndarray, " edges"]

    def __call__(self, indices: Int64[np.ndarray, " samples"]) -> Int64[np.ndarray, " samples"]:
        """The lengths, in tokens."""
        lengths = np.empty_like(indices)
        for shard, places, members in by_shard(indices, self.starts):
            lengths[places] = self.files.array(shard)[members]
        return lengths


@dataclass
class MeasuredFile:
    """Indices of samples in a file in, their lengths out."""

    path: Path
    _lengths: np.ndarray | None = field(default=None, init=False, repr=False)

    def __call__(self, indices: Int64[np.ndarray, " samples"]) -> Int64[np.ndarray, " samples"]:
        """The lengths, in tokens."""
        if self._lengths is None:
            self._lengths = np.load(self.path, mmap_mode="r")
        return self._lengths[indices].astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_lengths": None}  # a process maps the file itself


class _InPieces(Storage):
    """Reads a shard behind a url in large pieces: its captions one by one would be as many requests."""

    pieces: Pieces | None = None

    def read(self, url: str, offset: int, size: int) -> bytes:
        """The `size` bytes from byte `offset` of a file on."""
        if not is_remote(url):
            return super().read(url, offset, size)
        if self.pieces is None or self.pieces.url != url:
            self.pieces = Pieces(Storage(), url, self.size(url))
        return self.pieces(offset, size)


@dataclass
class _OfShard:
    work: Measure

    def __call__(self, shard: int) -> tuple[Lengths, dict[str, Any]]:
        source = copy(self.work.source)
        assert isinstance(source, TarShards)
        source.storage = _InPieces()
        first, end = source.starts[shard : shard + 2].tolist()
        return replace(self.work, source=source).of(first, end), {}


@dataclass
class _CountsOfShard:
    files: ShardFiles

    def __call__(self, shard: int) -> Counts:
        return Counts.of(np.load(self.files.path(shard, "npy")))


@dataclass
class _OfChunk:
    work: Measure
    size: int

    def __call__(self, chunk: int) -> Lengths:
        return self.work.of(chunk * _CHUNK, min((chunk + 1) * _CHUNK, self.size))


def _shard_files(source: TarShards, key: str) -> ShardFiles:
    return ShardFiles(source.rows_of, KIND, key)


def _size(source: Source) -> int:
    return source.num_samples + len(source.validation_indices)


def _file(source: Source, key: str) -> Path:
    identity = hashlib.blake2b(source.fingerprint().encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return cache_folder() / f"{identity}.{KIND}-{key}.npy"
