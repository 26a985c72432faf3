"""A web server of this machine that serves a folder in ranges, and misbehaves where a test says so."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server = self.server
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        fault = server.faults.pop(0) if server.faults and (body or server.faults[0] != "short") else ""
        path = server.folder / self.path.lstrip("/").split("?")[0]
        if fault in ("404", "403", "500") or not path.is_file():
            self.send_response(int(fault or HTTPStatus.NOT_FOUND))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        partial_answer = span is not None and fault != "no ranges"
        start, end = (int(span[1]), min(int(span[2]) + 1, size)) if partial_answer else (0, size)
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start) if body else bytes(end - start)
        if fault == "short":
            content = content[:-1]
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial_answer else HTTPStatus.OK)
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        if partial_answer:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        if fault == "cut":
            self.wfile.flush()
            self.close_connection = True

    def handle(self) -> None:
        with suppress(ConnectionError):  # clients hang up on answers they do not like
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A folder in, a server of it out.

    Args:
        folder: What it serves.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler))
        self.folder = folder
        self.faults: list[str] = []  # how the next answers misbehave: 403, 404, 500, cut, short, no ranges; "" does not
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server while the block runs."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
