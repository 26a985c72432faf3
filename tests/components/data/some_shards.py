"""Small shards as img2dataset writes them: tar files with jpg, txt and json, a .parquet and a _stats.json beside each."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

WORDS = "a red blue green dog house on the street with two trees and some sky".split()


@dataclass
class Pair:
    """A sample of a shard, with what img2dataset knows of it."""

    key: str
    caption: str
    picture: bytes
    size: tuple[int, int]
    metadata: dict[str, Any] = field(default_factory=dict)


def pairs(shard: int, count: int, seed: int = 0) -> list[Pair]:
    random = np.random.default_rng([seed, shard])
    made = []
    for number in range(count):
        size = tuple(int(side) for side in random.integers(8, 64, 2))
        buffer = io.BytesIO()
        Image.new("RGB", size, tuple(int(channel) for channel in random.integers(0, 256, 3))).save(buffer, "JPEG")
        picture, key = buffer.getvalue(), f"{shard:05d}{number:04d}"
        caption = " ".join(random.choice(WORDS, int(random.integers(1, 12))))
        metadata = {
            "url": f"https://example.org/{key}.jpg", "caption": caption, "key": key, "status": "success",
            "sha256": hashlib.sha256(picture).hexdigest(), "similarity": float(random.uniform(0.2, 0.4)),
            "PUNSAFE": None if number % 7 == 3 else float(random.uniform(0, 1)),
        }  # fmt: skip
        made.append(Pair(key, caption, picture, size, metadata))
    return made


def write_shard(
    folder: Path, name: str, made: list[Pair], parquet: bool = True, stats: bool = True, members: Mapping[str, bytes] = {}
) -> Path:
    """A shard; `members` take the place of the .json members of their keys."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.tar"
    with tarfile.open(file, "w") as tar:
        for pair in made:
            for ending, content in (
                ("jpg", pair.picture),
                ("txt", pair.caption.encode()),
                ("json", members.get(pair.key, json.dumps(pair.metadata).encode())),
            ):  # fmt: skip
                info = tarfile.TarInfo(f"{pair.key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    if parquet:
        failed = {"key": f"{name}failed", "status": "failed_to_download", "url": "https://example.org/gone.jpg"}
        table = pyarrow.Table.from_pylist([failed, *(pair.metadata for pair in made)][::-1])
        pyarrow.parquet.write_table(table, file.with_suffix(".parquet"))
    if stats:
        told = {"count": len(made) + 1, "successes": len(made), "failed_to_download": 1, "failed_to_resize": 0, "duration": 1.5}
        (folder / f"{name}_stats.json").write_text(json.dumps(told))
    return file


def write_shards(folder: Path, count: int = 3, each: int = 30, **options: bool) -> list[list[Pair]]:
    """Shards 00000.tar and so on, and what is in each of them."""
    made = [pairs(shard, each + 5 * shard) for shard in range(count)]
    for shard, content in enumerate(made):
        write_shard(folder, f"{shard:05d}", content, **options)
    return made
