"""Pictures by name in a folder, and nothing outside of it."""

import errno
import io
import os
import stat
from functools import lru_cache
from pathlib import Path

from components.attempts import WAITS, attempts
from components.errors import BadSample, RecipeError
from components.images import MAX_BYTES

_FINAL = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO,
    errno.EINVAL,
}  # fmt: skip
"""What is wrong with the name or the file itself; all else may be the fault of disk or network, and pass."""


class Folder:
    """Names of pictures in, their bytes out; the folder is checked to exist before anything starts.

    Annotations come from elsewhere: a name in them must not make a run read what is not among its pictures.

    Args:
        path: The folder that names are relative to; it may itself be a link.
        annotations: The file that names them, for error messages.
        follow_links: Whether links may lead out of the folder.

    Raises:
        RecipeError: There is no such folder.
    """

    def __init__(self, path: str, annotations: str, follow_links: bool) -> None:
        self.path = Path(path)
        self.follow_links = follow_links
        if not self.path.is_dir():
            raise RecipeError(
                f"The image folder {path} of {annotations} does not exist (key images). "
                "Give the folder that the picture names in the annotations are relative to."
            )
        self._root = os.path.realpath(path)

    def read(self, name: str) -> bytes:
        """The bytes of a picture. What may pass, as on a network's file system, is tried again.

        Raises:
            BadSample: It cannot be read, is no file, has more than 32 MiB, or lies outside of the folder.
            RecipeError: Every attempt failed: it is not the sample's fault.
        """
        for last in attempts(WAITS):
            try:
                return self._read(name)
            except OSError as error:
                if last:
                    raise RecipeError(
                        f"picture {self._shown(name)} could not be read in {len(WAITS) + 1} attempts ({error.strerror}). "
                        "Check disk and network, then start again."
                    ) from error
        raise AssertionError("the last attempt returns or raises")

    def _read(self, name: str) -> bytes:
        try:
            file = self._open(name)
        except (OSError, ValueError) as error:  # a NUL or half a surrogate pair in the name is a ValueError
            if isinstance(error, OSError) and error.errno not in _FINAL:
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            raise BadSample(f"picture {self._shown(name)} cannot be read ({reason}). Restore it or remove the sample.") from error
        with file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSample(f"picture {self._shown(name)} is not a file. Name the picture itself, or remove the sample.")
            if status.st_size > MAX_BYTES:
                raise BadSample(
                    f"picture {self._shown(name)} has {status.st_size} bytes; the limit is {MAX_BYTES} (32 MiB). "
                    "Make it smaller or remove the sample."
                )
            return file.read()

    def _open(self, name: str) -> io.FileIO:
        folder, _, file = name.rpartition("/")
        if name.startswith("/") or ".." in name.split("/"):
            raise BadSample(
                f"picture {name[:200]!a} is not named relative to the image folder {self.path}. Name it by its path below "
                "that folder, without `..`, and choose `images` so that all pictures are below it."
            )
        if self.follow_links:
            return io.FileIO(f"{self._root}/{name}", opener=_open_following)
        parent = _real_folder(self._root, folder)
        if not self._holds(parent):
            raise self._outside(name, parent)
        try:
            return io.FileIO(f"{parent}/{file}", opener=_open_itself)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        target = os.path.realpath(f"{parent}/{file}")
        if not self._holds(target):
            raise self._outside(name, target)
        return io.FileIO(target, opener=_open_itself)

    def _holds(self, path: str) -> bool:
        return path == self._root or path.startswith(self._root.rstrip("/") + "/")

    def _outside(self, name: str, target: str) -> BadSample:
        return BadSample(
            f"picture {self._shown(name)} is reached by a link out of the image folder, to {target}. Put the pictures into the "
            "folder, or set `follow_links: true` for this source if the links are yours."
        )

    def _shown(self, name: str) -> str:
        return f"{self.path}/{name}" if name.isprintable() and len(name) <= 200 else f"{self.path}/ {name[:200]!a}"


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)  # a named pipe must not hold up the worker


def _open_following(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


@lru_cache(maxsize=4096)  # pictures share folders; the bound is for a worker's memory
def _real_folder(root: str, folder: str) -> str:
    return os.path.realpath(f"{root}/{folder}")
