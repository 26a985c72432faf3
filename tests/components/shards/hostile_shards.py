"""Makers of tar shards, whole and broken: each returns the bytes of one shard, whose samples are 000000, 000001 ..."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

BLOCK = 512


def picture(number: int = 0, width: int = 64, height: int = 48, format: str = "JPEG") -> bytes:
    """An encoded picture of one color."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (number * 40 % 256, 90, 160)).save(file, format)
    return file.getvalue()


def png_bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG of a few bytes whose header says that it has as many pixels as would fill memory."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def sample(number: int, caption: str | bytes | None = None) -> list[tuple[str, bytes]]:
    """The members of a sample as img2dataset writes them: key.jpg, key.json, key.txt."""
    key = f"{number:06d}"
    text = f"caption {number}" if caption is None else caption
    data = text if isinstance(text, bytes) else text.encode()
    facts = json.dumps({"key": key, "caption": f"caption {number}", "width": 64, "height": 48})
    return [(f"{key}.jpg", picture(number)), (f"{key}.json", facts.encode()), (f"{key}.txt", data)]


def samples(count: int) -> list[tuple[str, bytes]]:
    return [member for number in range(count) for member in sample(number)]


def tar(members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive of these members, each (name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def header_of(shard: bytes, name: str) -> int:
    """Where the header of a member stands."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        return archive.getmember(name).offset


def _replaced(shard: bytes, at: int, content: bytes) -> bytes:
    return shard[:at] + content + shard[at + len(content) :]


def whole() -> bytes:
    return tar(samples(5))


def truncated() -> bytes:
    """Cut within the picture of sample 3."""
    return whole()[: header_of(whole(), "000003.jpg") + BLOCK + 100]


def truncated_between_members() -> bytes:
    """Cut where sample 3 begins: only the end of the archive is missing."""
    return whole()[: header_of(whole(), "000003.jpg")]


def zeroed_blocks() -> bytes:
    """Zeros over the whole sample 2."""
    start, end = header_of(whole(), "000002.jpg"), header_of(whole(), "000003.jpg")
    return _replaced(whole(), start, bytes(end - start))


def zeros_to_the_end() -> bytes:
    """As many bytes as were to come, but zeros from sample 3 on: a file system that crashed leaves such files."""
    return whole()[: header_of(whole(), "000003.jpg")] + bytes(30_000)


def bad_header() -> bytes:
    """One byte of the name of sample 2's picture is flipped."""
    return _replaced(whole(), header_of(whole(), "000002.jpg"), b"x")


def duplicate_key() -> bytes:
    """Sample 1 again, with another caption, at the end."""
    return tar(samples(5) + sample(1, "again"))


def zero_byte_picture() -> bytes:
    return tar([("000000.jpg", b""), ("000000.txt", b"a caption"), *sample(1)])


def zero_byte_caption() -> bytes:
    return tar([*sample(0, b""), *sample(1)])


def caption_with_nul() -> bytes:
    return tar([*sample(0, b"a\0b"), *sample(1)])


def caption_not_utf8() -> bytes:
    return tar([*sample(0, b"caf\xe9"), *sample(1)])


def caption_of_a_megabyte() -> bytes:
    return tar([*sample(0, b"word " * 200_000), *sample(1)])


def bomb() -> bytes:
    return tar([("000000.png", png_bomb()), ("000000.txt", b"a bomb"), *sample(1)])


def outside_names() -> bytes:
    """Names that would leave the folder if they were extracted."""
    return tar(
        [
            ("../../outside.jpg", picture()),
            ("../../outside.txt", b"up"),
            ("/etc/inside.jpg", picture()),
            ("/etc/inside.txt", b"root"),
        ]
    )


def symbolic_link() -> bytes:
    """The picture of sample 0 is a link to a file of the machine."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        link = tarfile.TarInfo("000000.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, content in [("000000.txt", b"a link"), *sample(1)]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def huge_size() -> bytes:
    """The header of sample 2's picture says 8 EiB, with a valid checksum."""
    at = header_of(whole(), "000002.jpg")
    header = bytearray(whole()[at : at + BLOCK])
    header[124:136] = b"\x80" + (2**63).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return _replaced(whole(), at, bytes(header))


def missing_caption() -> bytes:
    return tar([("000000.jpg", picture()), *sample(1)])


def missing_picture() -> bytes:
    return tar([("000000.txt", b"alone"), *sample(1)])


def web_page() -> bytes:
    return b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20


def gzipped() -> bytes:
    import gzip

    return gzip.compress(whole())


def damaged_picture() -> bytes:
    """The picture of sample 0 is noise."""
    noise = np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8).tobytes()
    return tar([("000000.jpg", noise), ("000000.txt", b"noise"), *sample(1)])


HOSTILE: dict[str, tuple[Callable[[], bytes], str, list[str]]] = {
    "truncated": (truncated, "truncated", ["000000", "000001", "000002"]),
    "truncated between members": (truncated_between_members, "truncated", ["000000", "000001", "000002"]),
    "zeroed blocks": (zeroed_blocks, "zero block", ["000000", "000001", "000003", "000004"]),
    "zeros to the end": (zeros_to_the_end, "zero block", ["000000", "000001", "000002"]),
    "bad header": (bad_header, "bad header", ["000000", "000001", "000003", "000004"]),
    "duplicate key": (duplicate_key, "duplicate key", ["000000", "000001", "000002", "000003", "000004"]),
    "zero-byte picture": (zero_byte_picture, "empty member", ["000001"]),
    "zero-byte caption": (zero_byte_caption, "empty member", ["000001"]),
    "caption with NUL": (caption_with_nul, "bad caption", ["000001"]),
    "caption not UTF-8": (caption_not_utf8, "bad caption", ["000001"]),
    "caption of a megabyte": (caption_of_a_megabyte, "bad caption", ["000001"]),
    "PNG bomb": (bomb, "bad picture", ["000001"]),
    "symbolic link": (symbolic_link, "symbolic link", ["000001"]),
    "huge size": (huge_size, "bad header", ["000000", "000001", "000003", "000004"]),
    "missing caption": (missing_caption, "missing caption", ["000001"]),
    "missing picture": (missing_picture, "missing picture", ["000001"]),
    "damaged picture": (damaged_picture, "bad picture", ["000001"]),
    "web page": (web_page, "not a tar", []),
    "gzip": (gzipped, "not a tar", []),
}
"""What is wrong: the shard, the kind of problem that must be told, and the keys of the samples that must remain."""
