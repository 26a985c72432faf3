"""The audit of one shard: every usable sample becomes a row, everything else a problem with its reason.

Source: the reading order of webdataset: consecutive members with one key are one sample.
"""

import hashlib
from collections import Counter

import numpy as np

from components.errors import BadSample, RecipeError
from components.images import MAX_BYTES, BadImage, read_size
from components.shards.rows import ROW, Audit
from components.shards.sample import (
    IMAGES,
    JSON_CAPTION,
    MAX_HEADER_BLOCKS,
    MAX_JSON_BYTES,
    MAX_TEXT_BYTES,
    caption,
    hash_key,
    split_name,
)
from components.shards.storage import Storage
from components.shards.tar import BLOCK, Member, Problem, walk

MAX_SAMPLES = 1_000_000
"""Samples of one shard; they decide how much memory its audit takes."""
MAX_PROBLEMS = 10_000
"""Problems of one shard that are kept; all are counted."""

_PIECE = 16 * 2**20  # bytes read at once: few enough requests that a store's time to answer does not count
_PICTURE_START = 2**16  # bytes in which nearly every picture has said its size
_MAX_SPAN = 2 * MAX_BYTES  # from a sample's first byte to its last, which are read at once
_USED = (*IMAGES, "txt", "json")
_MAX_OTHERS = 16  # members of one sample that are remembered though they are not used
_SHOWN = 200  # characters of a key in a problem


class Pieces:
    """A shard in, ranges of its bytes out, read in large pieces that follow one another.

    Attributes:
        kept_from: First byte that may still be asked for, which the next piece begins with where it is not too far back.
    """

    def __init__(self, storage: Storage, url: str, size: int) -> None:
        self.storage, self.url, self.size = storage, url, size
        self.start, self.piece, self.kept_from = 0, b"", 0

    def __call__(self, offset: int, size: int) -> bytes:
        """The `size` bytes from byte `offset` on."""
        if size > _PIECE or offset < self.start:  # what lies further ahead is asked for next
            return self.storage.read(self.url, offset, size)
        if offset + size > self.start + len(self.piece):
            near = self.start <= self.kept_from and offset + size - self.kept_from <= _PIECE
            start = self.kept_from if near else offset
            kept = self.piece[start - self.start :]
            self.piece = kept + self.storage.read(self.url, start + len(kept), min(_PIECE, self.size - start) - len(kept))
            self.start = start
        return self.piece[offset - self.start : offset - self.start + size]


class _Unusable(Exception):
    """A sample that becomes no row: what kind of problem it has, where, and why."""


class _ShardAudit:
    """The members of a shard in, rows and problems out."""

    def __init__(self, read: Pieces) -> None:
        self.read = read
        self.rows = np.empty(1024, ROW)
        self.samples = 0
        self.keys: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.problems: list[Problem] = []
        self.key = ""
        self.members: dict[str, Member] = {}

    def run(self) -> None:
        for entry in walk(self.read, self.read.size):
            if isinstance(entry, Problem):
                self.report(entry)
                continue
            if entry.name.rpartition("/")[2].startswith("."):  # as webdataset has it; macOS adds such files to archives
                continue
            key, extension = split_name(entry.name)
            if self.members and (key != self.key or extension in self.members):
                self.finish()
            if not self.members:
                self.read.kept_from = entry.header
            self.key = key
            if extension in _USED or len(self.members) < _MAX_OTHERS:
                self.members[extension] = entry
            if self.samples == MAX_SAMPLES:
                reason = f"only the first {MAX_SAMPLES:,} samples of a shard are used; split it"
                self.report(Problem("too many samples", key, entry.header, reason))
                return
        self.finish()
        if not self.samples and not self.counts:
            self.report(Problem("no samples", "", 0, "the archive holds no files"))

    def report(self, problem: Problem) -> None:
        self.counts[problem.kind] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem._replace(key=problem.key[:_SHOWN]))

    def finish(self) -> None:
        """The members of one key are complete."""
        if not self.members:
            return
        try:
            row = self.row(self.members)
        except _Unusable as error:
            kind, member, reason = error.args
            self.report(Problem(kind, self.key, member.offset, reason))
        else:
            if self.samples == len(self.rows):
                self.rows = np.concatenate([self.rows, np.empty_like(self.rows)])
            self.rows[self.samples] = row
            self.samples += 1
            self.keys.add(row[1])
        self.members = {}

    def row(self, members: dict[str, Member]) -> tuple[int, ...]:
        first = next(iter(members.values()))
        image = next((member for extension, member in members.items() if extension in IMAGES), None)
        text = members.get("txt", members.get("json"))
        in_json = "txt" not in members
        held = ", ".join(f".{extension}" for extension in members)[:_SHOWN]
        if image is None:
            raise _Unusable("missing picture", first, f"it has {held} and none of {', '.join(f'.{image}' for image in IMAGES)}")
        if text is None:
            raise _Unusable("missing caption", image, f"it has {held} and neither .txt nor .json")
        key = hash_key(self.key)
        if key in self.keys:
            raise _Unusable("duplicate key", image, "an earlier sample of this shard has the same key; that one is used")
        width, height = self.size_of(image)
        characters = len(self.caption_of(text, in_json))
        opening = min(image, text, key=lambda member: member.offset)
        blocks = (opening.offset - opening.header) // BLOCK
        if blocks > MAX_HEADER_BLOCKS:
            raise _Unusable("bad header", opening, f"its headers take {blocks} blocks; the limit is {MAX_HEADER_BLOCKS}")
        if max(image.offset + image.size, text.offset + text.size) - opening.header > _MAX_SPAN:
            raise _Unusable("far apart", opening, f"picture and caption lie more than {_MAX_SPAN:,} bytes apart")
        flags = blocks << 8 | (JSON_CAPTION if in_json else 0)
        return (
            image.offset, key, image.size, text.offset - image.offset, text.size, width, height, min(characters, 65_535), flags,
        )  # fmt: skip

    def size_of(self, image: Member) -> tuple[int, int]:
        if image.size == 0:
            raise _Unusable("empty member", image, "the picture has 0 bytes")
        if image.size > MAX_BYTES:
            raise _Unusable("bad picture", image, f"The picture has {image.size} bytes; the limit is {MAX_BYTES} (32 MiB).")
        for size in (min(image.size, _PICTURE_START), image.size):  # metadata before the header of a JPEG may be long
            try:
                return read_size(self.read(image.offset, size))
            except BadImage as error:
                if size == image.size:
                    raise _Unusable("bad picture", image, str(error)) from error
        raise AssertionError("the last attempt returns or raises")

    def caption_of(self, text: Member, in_json: bool) -> str:
        limit = MAX_JSON_BYTES if in_json else MAX_TEXT_BYTES
        if text.size == 0:
            raise _Unusable("empty member", text, "the caption has 0 bytes")
        if text.size > limit:
            raise _Unusable("bad caption", text, f"it has {text.size:,} bytes; the limit is {limit:,}")
        try:
            return caption(self.read(text.offset, text.size), in_json)
        except BadSample as error:
            raise _Unusable("bad caption", text, str(error)) from error


def audit_shard(url: str, name: str, storage: Storage) -> tuple[Audit, np.ndarray]:
    """A shard in, what is known of it and the rows of its usable samples out.

    Its headers, the first bytes of its pictures and its captions are looked at; memory stays below 300 MB whatever it holds.

    Args:
        url: Path or url of the shard.
        name: Its name in the index.
        storage: Reads it.

    Raises:
        RecipeError: It cannot be read.
    """
    identity = storage.identity(url)
    found = _ShardAudit(Pieces(storage, url, identity.size))
    found.run()
    if storage.identity(url) != identity:
        raise RecipeError(f"{url} changed while it was read. Wait until it is written, then start again.")
    rows = found.rows[: found.samples]
    digest = hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()
    return Audit(name, url, *identity, found.samples, digest, dict(found.counts), found.problems), rows
