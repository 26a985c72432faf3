"""The index of shards: where each sample stands, one memory-mapped file of rows a shard, and one summary of all shards."""

import hashlib
import json
import shlex
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int64

from components.atomic import save
from components.errors import RecipeError
from components.shards.names import names_in_index
from components.shards.storage import Storage
from components.shards.tar import Problem

ROW = np.dtype(
    [
        ("image_offset", "<u8"), ("key", "<u8"), ("image_size", "<u4"), ("text_offset", "<i4"), ("text_size", "<u4"),
        ("width", "<u2"), ("height", "<u2"), ("characters", "<u2"), ("flags", "<u2"),
    ]
)  # fmt: skip
"""One sample, 36 bytes. Offsets are of contents, in bytes of the shard, the text's from the picture's on; `key` is the hash of the
sample's key; `characters` of the caption, at most 65535; `flags`: JSON_CAPTION, and in the upper 8 bits how many blocks of 512
bytes the headers of the sample's first member take."""

SUMMARY = "shards.npz"
_LAYOUT = 1  # of rows and audits; raise it when they change
_OPEN_ROWS = 256


@dataclass
class Audit:
    """What the audit of a shard found.

    Args:
        name: Name of the shard inside the index.
        url: Where it was read.
        size: Its bytes; 0 where it could not be read.
        version: Its time of change or ETag.
        samples: Its usable samples.
        digest: BLAKE2b of its rows, in hexadecimal.
        counts: How many problems of each kind it has.
        problems: The first 10,000 of them.
    """

    name: str
    url: str
    size: int
    version: str
    samples: int
    digest: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class ShardIndex:
    """The folder of an index and its shards in, the rows of each shard out.

    Args:
        folder: Folder of the index.
        names: Paths or urls of the shards, in the order of the index.
        bytes: Size of each shard when it was audited.
        sizes: Samples of each shard.
        digests: Of the rows of each shard.
        fingerprint: Hash of the names, sizes and rows of all shards.
        patterns: What the shards were named by, for messages.
    """

    def __init__(
        self,
        folder: Path,
        names: list[str],
        bytes: Int64[np.ndarray, " shards"],
        sizes: Int64[np.ndarray, " shards"],
        digests: list[str],
        fingerprint: str,
        patterns: list[str],
    ) -> None:
        self.folder, self.names, self.bytes, self.sizes = folder, names, bytes, sizes
        self.digests, self.fingerprint, self.patterns = digests, fingerprint, patterns
        self._files = names_in_index(names)
        self._rows: OrderedDict[int, np.ndarray] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path, shards: list[str], patterns: list[str] | None = None) -> "ShardIndex":
        """The index of these shards.

        Args:
            folder: Folder of the index.
            shards: Paths or urls.
            patterns: What they were named by, for messages; null: each by its name.

        Raises:
            RecipeError: There is none in this folder, or it is one of other shards.
        """
        folder, patterns = Path(folder), patterns or shards
        summary = _read_summary(folder, index_command(folder, patterns))
        hashed = hashlib.blake2b(digest_size=16)
        for name in ("names", "bytes", "samples", "digests"):
            hashed.update(summary[name].tobytes())
        digests = summary["digests"].tobytes().decode().split("\n")
        index = cls(folder, sorted(shards), summary["bytes"], summary["samples"], digests, hashed.hexdigest(), patterns)
        index._check_names(_names(summary))
        return index

    def _check_names(self, audited: list[str]) -> None:
        if audited == self._files:
            return
        found, wanted = set(audited), set(self._files)
        missing, others = sorted(wanted - found), sorted(found - wanted)
        what = [f"lacks {len(missing)} of them ({missing[0]} ...)"] if missing else []
        what += [f"has {len(others)} others ({others[0]} ...)"] if others else []
        raise RecipeError(
            f"The index {self.folder} is not one of the {len(self.names)} shards {self.names[0]} to {self.names[-1]}: it "
            f"{' and '.join(what) or 'has them in another order'}. Run {self.command}, or name its own folder (`index`)."
        )

    @property
    def command(self) -> str:
        """What makes this index."""
        return index_command(self.folder, self.patterns)

    def rows(self, shard: int) -> np.ndarray:
        """The rows of a shard, memory-mapped.

        Args:
            shard: Number of the shard.

        Raises:
            RecipeError: They are missing or damaged.
        """
        if self.sizes[shard] == 0:  # a shard that could not be read has no file
            return np.empty(0, ROW)
        if shard in self._rows:
            self._rows.move_to_end(shard)
            return self._rows[shard]
        path = self.file(shard, "rows.npy")
        rows = _load_rows(path)
        if rows is None or len(rows) != self.sizes[shard]:
            raise RecipeError(f"{path}, the rows of shard {self.names[shard]}, is missing or damaged. Run {self.command}.")
        while len(self._rows) >= _OPEN_ROWS:
            self._rows.popitem(last=False)
        self._rows[shard] = rows
        return rows

    def file(self, shard: int, suffix: str) -> Path:
        """The file of a shard in the folder of the index: `00000.SUFFIX`."""
        return _file(self.folder, self._files[shard], suffix)

    def check(self, shard: int, storage: Storage) -> None:
        """Compare the size of a shard with the audited one.

        Raises:
            RecipeError: They differ.
        """
        size = storage.size(self.names[shard])
        if size != self.bytes[shard]:
            raise RecipeError(
                f"Shard {self.names[shard]} has {size} bytes; when its index was made it had {self.bytes[shard]}. "
                f"Run {self.command}: it audits only what changed."
            )

    def check_version(self, shard: int, storage: Storage) -> None:
        """Compare size and time of change, or ETag, of a shard with the audited ones, as another audit would.

        Raises:
            RecipeError: They differ.
        """
        self.check(shard, storage)
        audited = read_audit(self.folder, self._files[shard])
        if audited is not None and audited.version != storage.identity(self.names[shard]).version:
            raise RecipeError(
                f"Shard {self.names[shard]} changed after its index was made. Run {self.command}: it audits only what changed."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": OrderedDict()}


def write_shard(folder: Path, audit: Audit, rows: np.ndarray) -> None:
    """Write the files of one shard: rows first, so that a shard whose audit is there is whole."""
    save(_file(folder, audit.name, "rows.npy"), lambda file: np.save(file, rows))
    content = json.dumps({"layout": _LAYOUT, **asdict(audit)}, indent=1)
    save(_file(folder, audit.name, "audit.json"), lambda file: file.write(content.encode()))


def read_audit(folder: Path, name: str) -> Audit | None:
    """What an earlier audit found in a shard; None where there is none that is whole."""
    try:
        content = json.loads(_file(folder, name, "audit.json").read_bytes())
        if content.pop("layout") != _LAYOUT:
            return None
        content["problems"] = [Problem(*problem) for problem in content["problems"]]
        audit = Audit(**content)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rows = _load_rows(_file(folder, name, "rows.npy"))
    return audit if rows is not None and len(rows) == audit.samples else None


def write_summary(folder: Path, audits: list[Audit]) -> None:
    """Write the summary of all shards, in the order of their paths."""
    arrays: dict[str, Any] = {
        "names": np.frombuffer(_joined([audit.name for audit in audits]), np.uint8),
        "digests": np.frombuffer(_joined([audit.digest for audit in audits]), np.uint8),
        "bytes": np.array([audit.size for audit in audits], np.int64),
        "samples": np.array([audit.samples for audit in audits], np.int64),
    }
    save(folder / SUMMARY, lambda file: np.savez(file, **arrays))


def check_replaced(folder: Path, names: list[str]) -> None:
    """See that the summary of an index may be replaced by one of these shards.

    Raises:
        RecipeError: It has shards that are not among them.
    """
    try:
        others = sorted(set(_names(_read_summary(folder, ""))) - set(names))
    except RecipeError:  # there is none, or a damaged one
        return
    if others:
        raise RecipeError(
            f"The index {folder} is one of other shards, of which {len(others)} ({others[0]} ...) are not among the {len(names)} "
            f"named ({names[0]} ...). Name all of them, or another folder for the index with --index FOLDER (in a recipe: the "
            f"source's `index`), or remove {folder / SUMMARY} if the others are gone."
        )


def _names(summary: dict[str, np.ndarray]) -> list[str]:
    return summary["names"].tobytes().decode(errors="surrogateescape").split("\n")


def _joined(names: list[str]) -> bytes:
    return "\n".join(names).encode(errors="surrogateescape")


def index_command(folder: Path, patterns: list[str]) -> str:
    """The command that makes an index, for a shell."""
    return f"python main.py index --shards {shlex.join(patterns)} --index {shlex.quote(str(folder))}"


def _read_summary(folder: Path, command: str) -> dict[str, np.ndarray]:
    path = folder / SUMMARY
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in ("names", "bytes", "samples", "digests")}
    except FileNotFoundError as error:
        raise RecipeError(f"There is no index in {folder} ({SUMMARY} is missing). Run {command} first, to its end.") from error
    except OSError as error:
        raise RecipeError(f"The index summary {path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise RecipeError(f"The index summary {path} is damaged. Run {command}: what is finished is kept.") from error


def _load_rows(path: Path) -> np.ndarray | None:
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.dtype == ROW and rows.ndim == 1 else None


def _file(folder: Path, name: str, suffix: str) -> Path:
    return folder / f"{name}.{suffix}"
