"""Ranges of bytes of files, on this machine or behind a url, with retries.

Source: fsspec's file systems (filesystem-spec.readthedocs.io).
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from components.attempts import WAITS, attempts
from components.errors import RecipeError
from components.shards.names import is_remote

Result = TypeVar("Result")

_FINAL_STATUS = range(400, 500)
_TRANSIENT_STATUS = (408, 425, 429)  # time-out, too early, too many requests
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_NETWORK_TIMEOUT = 60  # seconds without one byte


class Identity(NamedTuple):
    """Which version of a file this is: its size in bytes, and its time of change or its ETag."""

    size: int
    version: str


class _Short(OSError):
    """An answer with fewer bytes than were asked for."""


class Storage:
    """Names of files in, ranges of their bytes out. What fails is tried again before it is an error.

    Files on this machine are read through a few open descriptors; urls through fsspec, whose packages read credentials and
    endpoints from the environment and from their own configuration. May be pickled, and used before and after a
    fork, but not by several threads at once.

    Args:
        max_open: Files of this machine that are open at once, at least 1.
        waits: Seconds before each new attempt.
    """

    def __init__(self, max_open: int = 64, waits: tuple[float, ...] = WAITS) -> None:
        self.max_open = max_open
        self.waits = waits
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, url: str, offset: int, size: int) -> bytes:
        """The `size` bytes from byte `offset` of a file on.

        Raises:
            RecipeError: There is no such file, it has not so many bytes, or every attempt failed.
        """
        if size == 0:
            return b""
        read = _read_remote if is_remote(url) else self._read_local
        return self._try(url, f"bytes {offset} to {offset + size - 1}", lambda: read(url, offset, size))

    def identity(self, url: str) -> Identity:
        """Size and version of a file.

        Raises:
            RecipeError: There is no such file, or every attempt failed.
        """
        identity = _remote_identity if is_remote(url) else _local_identity
        return self._try(url, "its size", lambda: identity(url))

    def size(self, url: str) -> int:
        """Size of a file, in bytes."""
        return self.identity(url).size

    def close(self) -> None:
        """Close the files that are open."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read_local(self, path: str, offset: int, size: int) -> bytes:
        descriptor = self._descriptor(path)
        pieces = []
        while size and (piece := os.pread(descriptor, size, offset)):  # at most 2 GiB at a time
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        if size:
            end = os.fstat(descriptor).st_size
            raise RecipeError(
                f"{path} has {end} bytes, but bytes up to {offset + size} were asked for: it was cut off or is being written. "
                "Fetch it again."
            )
        return b"".join(pieces)

    def _descriptor(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            while len(self._open) >= self.max_open:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[path]

    def _try(self, url: str, what: str, attempt: Callable[[], Result]) -> Result:
        for last in attempts(self.waits):
            try:
                return attempt()
            except RecipeError:
                raise
            except Exception as error:  # the clients of object stores raise nearly anything
                if url.startswith("http") and isinstance(error.__cause__, Exception):
                    error = error.__cause__  # fsspec calls whatever fails when it asks a web server for a size "not found"
                if url in self._open:
                    os.close(self._open.pop(url))  # a stale handle of a network file system stays stale
                if last or not _may_pass(error):
                    raise RecipeError(_message(url, what, error, len(self.waits) if last else 0)) from error
        raise AssertionError("the last attempt returns or raises")

    def __getstate__(self) -> dict[str, Any]:
        return {"max_open": self.max_open, "waits": self.waits, "_open": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


def _local_identity(path: str) -> Identity:
    stat = os.stat(path)  # noqa: PTH116
    return Identity(stat.st_size, str(stat.st_mtime_ns))


def _remote_identity(url: str) -> Identity:
    system, path = _file_system(url)
    info = system.info(path)
    size = info.get("size")
    if size is None:
        raise RecipeError(f"{url}: the server does not say how many bytes it has (Content-Length). Serve the file itself.")
    version = next(
        (info[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime") if info.get(key)), ""
    )
    return Identity(int(size), str(version).strip('"'))


def _read_remote(url: str, offset: int, size: int) -> bytes:
    system, path = _file_system(url)
    if url.startswith("http"):  # its cat_file takes a whole file for a range where the server knows no ranges; its files do not
        with system.open(path, size=offset + size, block_size=size, cache_type="none") as file:
            file.seek(offset)
            try:
                data = file.read(size)
            except ValueError as error:
                raise RecipeError(f"{url}: its server answers no ranged reads. Use another server, or copy the shards.") from error
    else:
        data = system.cat_file(path, start=offset, end=offset + size)
    if len(data) != size:
        raise _Short(f"{len(data)} bytes came instead of {size}")
    return data


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a url: fsspec keeps one for each process."""
    import fsspec

    protocol = url.split("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=_NETWORK_TIMEOUT, sock_read=_NETWORK_TIMEOUT)}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # ValueError: fsspec knows no such protocol
        package = _PACKAGES.get(protocol)
        remedy = f"Install its package: pip install {package}" if package else "Name a path, or a url of https://, s3:// or gs://"
        raise RecipeError(f"{url} cannot be read: {error}. {remedy}.") from error


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    final = isinstance(status, int) and status in _FINAL_STATUS and status not in _TRANSIENT_STATUS
    return not final and not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)


def _message(url: str, what: str, error: Exception, retries: int) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if retries:
        return f"{url}: {what} could not be read in {retries + 1} attempts: {reason}. Check disk and network, then start again."
    if isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410):
        return f"{url} is not there ({reason}). Correct the path, or fetch the shard."
    if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
        return f"{url} may not be read ({reason}). Give yourself read permission, or set the credentials of its store."
    return f"{url}: {what} cannot be read: {reason}. Name a file that can be read in ranges."
