"""The members of a tar archive, from its headers alone: nothing is extracted, and a damaged part loses only itself.

Source: POSIX.1-2017, pax, "ustar interchange format"; the GNU tar manual, "Basic Tar Format"; compared with Python's tarfile.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

BLOCK = 512
MAX_EXTENSION = 2**16
"""Bytes of a long name or of a pax header."""

_PIECE = 2**18  # bytes that are scanned at once for the next header
_MAX_END = 20_480  # zeros at the end of a whole archive: two blocks, and what fills up its last record
_EXTENSIONS = b"LKxXg"  # GNU's long names and links, pax headers of the next member and of all that follow
_REGULAR = b"0\0007"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
_UNUSABLE = {b"1": "hard link", b"2": "symbolic link", b"S": "sparse file"}
_MAY_STAND_IN_A_CHECKSUM = np.zeros(256, dtype=bool)
_MAY_STAND_IN_A_CHECKSUM[list(b"01234567 \0")] = True
_FORMATS = {
    b"\x1f\x8b": "a gzip archive: unpack it with gunzip, since only plain tar files can be read in ranges",
    b"BZh": "a bzip2 archive: unpack it with bunzip2, since only plain tar files can be read in ranges",
    b"\xfd7zXZ": "an xz archive: unpack it with unxz, since only plain tar files can be read in ranges",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive: unpack it with unzstd, since only plain tar files can be read in ranges",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    b"<": "a web page or an answer in XML that was saved instead of the shard: fetch it again",
    b"{": "JSON text that was saved instead of the shard: fetch it again",
}


class Member(NamedTuple):
    """A plain file of an archive.

    Args:
        name: Its path in the archive.
        offset: First byte of its content in the archive.
        size: Bytes of its content.
        header: First byte of its headers, which end where the content begins.
    """

    name: str
    offset: int
    size: int
    header: int


class Problem(NamedTuple):
    """What is wrong with a part of an archive.

    Args:
        kind: One of a few words, by which problems are counted: `truncated`, `zero block`, `bad header`, `not a tar`, `link` ...
        key: The sample or member it is about; empty for the archive itself.
        offset: Byte of the archive at which it was noticed.
        reason: What exactly, for people.
    """

    kind: str
    key: str
    offset: int
    reason: str


class _BadHeader(ValueError):
    """A block that is no header. The message says why."""


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes


def walk(read: Callable[[int, int], bytes], size: int) -> Iterator[Member | Problem]:
    """An archive in, its plain files in order out, with whatever is wrong between them.

    After a block that is no header the walk goes on at the next one, so that one broken block does not cost the rest of the shard.

    Args:
        read: `read(offset, size)` returns exactly these bytes of the archive.
        size: Bytes of the archive.
    """
    at = start = 0  # start: of the headers of the next member
    defaults: dict[str, str] = {}
    extended: dict[str, str] = {}  # what headers before the next member say of it
    if size < BLOCK:
        yield _not_a_tar(read(0, size), f"{size} bytes")
        return
    while at + BLOCK <= size:
        block = read(at, BLOCK)
        try:
            header = _parse(block)
        except _BadHeader as error:
            after, data = _next_header(read, at + BLOCK, size)
            problem = _between(at, after, data, size, block, str(error))
            if problem:
                yield problem
            if after is None:
                return
            at = start = after
            extended = {}
            continue
        content = at + BLOCK
        values = {**defaults, **extended}
        name = values.get("path", header.name)
        length = int(values.get("size", header.size))
        if header.kind in _WITHOUT_DATA or (header.kind == b"\0" and name.endswith("/")):
            length = 0
        if content + length > size:
            after, _ = _next_header(read, content, size)
            if after is None:
                missing = content + length - size
                yield Problem("truncated", name, at, f"the archive ends {missing} bytes before the end of its last member")
                return
            reason = f"its header says {length} bytes, more than the archive has; {after - at} bytes were passed over"
            yield Problem("bad header", name, at, reason)
            at = start = after
            extended = {}
            continue
        at = content + _padded(length)
        if header.kind in _EXTENSIONS:
            if length > MAX_EXTENSION:
                yield Problem("bad header", name, content, f"a name or header of {length} bytes; the limit is {MAX_EXTENSION}")
            elif header.kind == b"L":
                extended["path"] = _text(read(content, length))
            elif header.kind == b"g":
                defaults.update(_pax(read(content, length)))
            elif header.kind in b"xX":
                extended.update(_pax(read(content, length)))
            continue
        if header.kind in _REGULAR:
            if not name.endswith("/"):
                yield Member(name, content, length, start)
        elif header.kind in _UNUSABLE:
            kind = _UNUSABLE[header.kind]
            yield Problem(kind, name, start, f"a {kind} is not read; put the file itself into the archive")
        start, extended = at, {}
    yield Problem("truncated", "", size, "the archive does not end with zero blocks as a whole one does: more may be missing")


def _parse(block: bytes) -> _Header:
    if not any(block):
        raise _BadHeader("a block of zeros")
    checksum = _number(block[148:156])
    counted = block[:148] + block[156:]
    unsigned = 256 + sum(counted)  # the checksum counts itself as eight spaces
    if checksum != unsigned and checksum != unsigned - 256 * sum(
        byte > 127 for byte in counted
    ):  # some old tars count signed bytes
        raise _BadHeader(f"a block whose checksum is {unsigned}, not {checksum} as it says")
    size = _number(block[124:136])
    if size < 0:
        raise _BadHeader(f"a header that says a size of {size} bytes")
    kind, name, prefix = block[156:157], _text(block[:100]), _text(block[345:500])
    return _Header(f"{prefix}/{name}" if prefix and kind not in b"LKS" else name, size, kind)


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary numbers for what does not fit into them."""
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0o377 else 0)
    digits = field.split(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise _BadHeader("a block that is no header")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode(errors="surrogateescape")


def _pax(records: bytes) -> dict[str, str]:
    """The path and the size of a pax header; its records are `length key=value`, the length that of the whole record."""
    found = {}
    while records:
        length, _, rest = records.partition(b" ")
        if not length.isdigit() or len(length) > 6 or not len(length) + 1 < int(length) <= len(records):
            break
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"path" or (key == b"size" and value.isdigit() and len(value) < 20):
            found[key.decode()] = value.decode(errors="surrogateescape")
        records = records[int(length) :]
    return found


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _next_header(read: Callable[[int, int], bytes], start: int, size: int) -> tuple[int | None, bool]:
    """Where the next block with a valid checksum stands, and whether there is anything but zeros before it."""
    data = False
    for piece in range(start, size, _PIECE):
        content = np.frombuffer(read(piece, min(_PIECE, size - piece)), np.uint8)
        if not content.any():
            continue
        data = True
        blocks = content[: len(content) // BLOCK * BLOCK].reshape(-1, BLOCK)
        digits = blocks[:, 148:156]
        for number in np.flatnonzero(_MAY_STAND_IN_A_CHECKSUM[digits].all(1) & digits.any(1)):
            try:
                _parse(blocks[number].tobytes())
            except _BadHeader:
                continue
            return piece + int(number) * BLOCK, data
    return None, data


def _between(at: int, after: int | None, data: bool, size: int, block: bytes, reason: str) -> Problem | None:
    """What is wrong where a header was due, if anything is: zeros to the end of the archive are as it should be."""
    zeros = not any(block)
    if after is not None:
        return Problem("zero block" if zeros else "bad header", "", at, f"{reason}; {after - at} bytes were passed over")
    if zeros and data:
        return Problem("zero block", "", at, f"{size - at} bytes from here on hold no header")
    if zeros:
        reason = f"{size - at} zeros follow, more than end a whole archive: what stood there is lost"
        return Problem("zero block", "", at, reason) if size - at > _MAX_END else None
    if at == 0:
        return _not_a_tar(block, f"something else: it begins with {block[:16]!r}")
    return Problem("bad header", "", at, f"{reason}; no header follows in the last {size - at} bytes")


def _not_a_tar(first: bytes, otherwise: str) -> Problem:
    what = next((what for start, what in _FORMATS.items() if first.lstrip().startswith(start)), otherwise)
    return Problem("not a tar", "", 0, f"the file is no tar archive but {what}")
