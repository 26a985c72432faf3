"""Pictures of evaluations: digests and perceptual hashes of all that lie in folders and zip archives, kept in the cache folder."""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8, UInt64

from components.atomic import save
from components.data.shard_files import in_parallel
from components.errors import BadSample, RecipeError
from components.images import MAX_BYTES
from components.perceptual_hash import SIDE, perceptual_hash, picture_gray

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_PIECE = 2**20
_AT_ONCE = 64  # pictures that a process reads in one go
_LAYOUT = 1  # of the cached files; raise it when they change


@dataclass(frozen=True)
class File:
    """One picture of a folder or of an archive.

    Args:
        path: The file, or the archive that holds it.
        member: Its name in the archive; empty for a file.
        version: Changes when its content does.
    """

    path: str
    member: str
    version: str

    @property
    def name(self) -> str:
        """The path, through the archive where there is one."""
        return f"{self.path}/{self.member}" if self.member else self.path

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            BadSample: It cannot be read, or is larger than any picture may be.
        """
        try:
            archive = _archive(self.path, os.getpid()) if self.member else None
            info = archive.getinfo(self.member) if archive else None
            size = info.file_size if info else Path(self.path).stat().st_size
            if size > MAX_BYTES:
                raise BadSample(f"it has {size} bytes; the limit is {MAX_BYTES} (32 MiB)")
            if archive is None or info is None:
                return Path(self.path).read_bytes()
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadSample("it is compressed in another way than deflate, whose size is not known before")
            with archive.open(info) as file:
                pieces = list(iter(partial(file.read, _PIECE), b""))  # never more at once, whatever the archive claims
            return b"".join(pieces)
        except BadSample:
            raise
        except Exception as error:  # zipfile raises nearly anything for what is damaged, encrypted or compressed in a new way
            raise BadSample(f"it cannot be read: {error}") from error


@dataclass(frozen=True)
class EvaluationPictures:
    """The pictures of some folders, as they are looked for.

    Args:
        files: Those that can be decoded.
        digests: SHA-256 of their bytes.
        hashes: Their perceptual hashes.
        grays: Their small gray pictures.
        broken: The others, each with the reason.
    """

    files: list[File]
    digests: UInt8[np.ndarray, "pictures 32"]
    hashes: UInt64[np.ndarray, " pictures"]
    grays: UInt8[np.ndarray, "pictures 32 32"]
    broken: list[str]


def read_evaluation_pictures(folders: list[Path], processes: int) -> EvaluationPictures:
    """Folders in, their pictures out. What was read once is kept in the user's cache folder until a file there changes.

    Args:
        folders: Folders with .jpg, .jpeg, .png and .webp files at any depth, or in .zip archives; or such an archive itself.
        processes: Processes that read, at least 1.

    Raises:
        RecipeError: A folder is not there or holds no picture, an archive is damaged, or no picture can be decoded.
    """
    files = [file for folder in folders for file in _files(folder)]
    cached = _cache_file(files)
    damaged = (OSError, ValueError, KeyError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged), cached.open("rb") as file, np.load(file) as kept:  # none yet, or damaged by a full disk
        return _pictures(files, **{name: kept[name] for name in ("digests", "grays", "reasons")})
    parts = list(
        in_parallel(partial(_hash, files), range(0, len(files), _AT_ONCE), processes, "evaluation pictures", f"{_AT_ONCE} pictures")
    )
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    pictures = _pictures(files, **arrays)
    with contextlib.suppress(RecipeError):  # a cache that cannot be written only costs the next start a pass
        save(cached, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    return pictures


def _pictures(files: list[File], digests: np.ndarray, grays: np.ndarray, reasons: np.ndarray) -> EvaluationPictures:
    broken = [f"{file.name}: {reason}" for file, reason in zip(files, reasons, strict=True) if reason]
    if len(broken) == len(files):
        raise RecipeError(f"None of the {len(files)} evaluation pictures can be used. The first: {broken[0]}")
    whole = reasons == ""
    return EvaluationPictures(
        [file for file, reason in zip(files, reasons, strict=True) if not reason],
        digests[whole],
        perceptual_hash(grays[whole]),
        grays[whole],
        broken,
    )


def _hash(files: list[File], first: int) -> dict[str, np.ndarray]:
    part = files[first : first + _AT_ONCE]
    digests = np.zeros((len(part), 32), dtype=np.uint8)
    grays = np.zeros((len(part), SIDE, SIDE), dtype=np.uint8)
    reasons = [""] * len(part)
    for number, file in enumerate(part):
        try:
            data = file.read()
            grays[number] = picture_gray(data)
        except BadSample as error:
            reasons[number] = str(error)[:200]
        else:
            digests[number] = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
    return {"digests": digests, "grays": grays, "reasons": np.array(reasons)}


def _files(folder: Path) -> list[File]:
    if folder.suffix.lower() == ".zip" and folder.is_file():
        found = list(_members(folder))
    elif folder.is_dir():
        found = [file for path in _walk(folder) for file in _of(path)]
    else:
        raise RecipeError(
            f"There is no folder {folder} of evaluation pictures (--against). Correct the path, or download the pictures."
        )
    if not found:
        raise RecipeError(
            f"{folder} (--against) holds no picture: no {', '.join(ENDINGS)} file, and no .zip archive of them, at any depth. "
            "Name the folder that the evaluation's pictures lie in."
        )
    return found


def _of(path: Path) -> Iterator[File]:
    ending = path.suffix.lower()
    if ending in ENDINGS and not path.name.startswith("._"):  # what macOS puts beside a file
        stat = path.stat()
        yield File(str(path), "", f"{stat.st_size} {stat.st_mtime_ns}")
    elif ending == ".zip":
        yield from _members(path)


def _walk(folder: Path) -> Iterator[Path]:
    """Files at any depth, sorted, through links to folders too, each folder once."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if os.path.realpath(Path(here, name)) not in seen)
        yield from (path for name in sorted(names) if (path := Path(here, name)).is_file())


def _members(path: Path) -> Iterator[File]:
    try:
        infos = _archive(str(path), os.getpid()).infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise RecipeError(
            f"The archive {path} of evaluation pictures (--against) cannot be read: {error}. Fetch it again."
        ) from error
    for info in sorted(infos, key=lambda info: info.filename):
        member = PurePosixPath(info.filename)
        if member.suffix.lower() in ENDINGS and not member.name.startswith("._"):
            yield File(str(path), info.filename, f"{info.file_size} {info.CRC}")


@lru_cache(maxsize=4)
def _archive(path: str, process: int) -> zipfile.ZipFile:  # after a fork, two processes would move one position in the file
    return zipfile.ZipFile(path)


def _cache_file(files: list[File]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm_recipes"
    listing = [f"{_LAYOUT} {len(files)}", *(f"{Path(file.path).absolute()}\0{file.member}\0{file.version}" for file in files)]
    digest = hashlib.blake2b("\n".join(listing).encode(errors="surrogateescape"), digest_size=16)
    return folder / f"{digest.hexdigest()}.npz"
