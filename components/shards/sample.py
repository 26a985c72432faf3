"""One sample of a shard: how its members are named, what its caption may be, and reading it by its row.

Source: the webdataset convention (github.com/webdataset/webdataset): consecutive members with one key are one sample.
"""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from components.errors import BadSample
from components.shards.storage import Storage
from components.shards.tar import BLOCK, Member, walk
from components.turns import MAX_CHARACTERS

IMAGES = ("jpg", "jpeg", "png", "webp")
JSON_CAPTION = 1
"""Flag of a row: the caption is the field `caption` of the sample's .json member."""
MAX_HEADER_BLOCKS = 255
MAX_TEXT_BYTES = 4 * MAX_CHARACTERS  # no character takes more in UTF-8
MAX_JSON_BYTES = 2**20


def split_name(name: str) -> tuple[str, str]:
    """The name of a member in, its sample's key and its extension out: `a/b.c.jpg` is `c.jpg` of the sample `a/b`."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def hash_key(key: str) -> int:
    """The first 8 bytes of BLAKE2b of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape")).digest()[:8], "little")


def caption(data: bytes, in_json: bool) -> str:
    """The content of a .txt member, or of a .json member with a field `caption`, in, the caption out, without space around it.

    Raises:
        BadSample: It is not UTF-8 or not JSON, empty, too long, or holds a NUL character. The message says which.
    """
    try:
        text: Any = json.loads(data).get("caption") if in_json else data.decode()
    except (ValueError, AttributeError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise BadSample(f"The caption is not {'a JSON object' if in_json else 'UTF-8'}: {str(error)[:100]}.") from error
    if not isinstance(text, str) or not text.strip():
        raise BadSample("The caption is empty.")
    if len(text) > MAX_CHARACTERS:
        raise BadSample(f"The caption has {len(text):,} characters; the limit is {MAX_CHARACTERS:,}.")
    if "\0" in text:
        raise BadSample(f"The caption holds a NUL character, at {text.index(chr(0))}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half a character
        raise BadSample("The caption holds half of a surrogate pair.") from error
    return text.strip()


def span(row: np.void) -> tuple[int, int]:
    """The row of a sample in, first byte and number of bytes of its shard out: headers of its first member to end of its last."""
    image, text = int(row["image_offset"]), int(row["image_offset"]) + int(row["text_offset"])
    start = min(image, text) - BLOCK * (int(row["flags"]) >> 8)
    return start, max(image + int(row["image_size"]), text + int(row["text_size"])) - start


class Pair(NamedTuple):
    """A sample: its key, its encoded picture and its caption."""

    key: str
    image: bytes
    caption: str


def read_sample(storage: Storage, url: str, row: np.void) -> Pair:
    """A shard and the row of a sample in, the sample out: one read.

    Raises:
        RecipeError: The shard cannot be read.
        BadSample: The shard does not hold this sample there any longer, or its caption is not one.
    """
    start, size = span(row)
    data = storage.read(url, start, size)
    members = {
        entry.offset + start: entry for entry in walk(lambda at, count: data[at : at + count], size) if isinstance(entry, Member)
    }
    image = int(row["image_offset"])
    contents, key = [], ""
    for offset, count in ((image, int(row["image_size"])), (image + int(row["text_offset"]), int(row["text_size"]))):
        member = members.get(offset)
        if member is None or member.size != count or hash_key(split_name(member.name)[0]) != int(row["key"]):
            found = f"{member.name[:200]!r} of {member.size} bytes" if member else "no member"
            raise BadSample(f"It changed after its index was made: at byte {offset} the shard holds {found}.")
        key = split_name(member.name)[0]
        contents.append(data[offset - start : offset - start + count])
    return Pair(key, contents[0], caption(contents[1], bool(int(row["flags"]) & JSON_CAPTION)))


def read_caption(storage: Storage, url: str, row: np.void) -> str:
    """A shard and the row of a sample in, its caption alone out.

    Raises:
        RecipeError: The shard cannot be read.
        BadSample: The caption is not one.
    """
    data = storage.read(url, int(row["image_offset"]) + int(row["text_offset"]), int(row["text_size"]))
    return caption(data, bool(int(row["flags"]) & JSON_CAPTION))
