"""Ranges of files on disk and behind a url: right bytes, few open files, and what fails is tried again or named."""

import multiprocessing
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from components.errors import RecipeError
from components.shards.storage import Storage
from tests.components.shards.serving import serving

DATA = np.random.default_rng(0).bytes(300_000)
RANGES = [(0, 10), (299_990, 10), (0, 300_000), (123_456, 65_537)]


@pytest.fixture
def folder(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.tar").write_bytes(DATA)
    return tmp_path


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


def quick(**options) -> Storage:
    return Storage(waits=(0.0, 0.0, 0.0, 0.0, 0.0), **options)


@pytest.mark.parametrize(("offset", "size"), RANGES)
def test_ranges_of_files(folder, server, offset: int, size: int) -> None:
    for place in (str(folder), server.url):
        assert quick().read(f"{place}/0.tar", offset, size) == DATA[offset : offset + size]
    assert [request[0] for request in server.requests] == ["GET"]  # one request, and for these bytes alone
    assert server.requests[0][2] == f"bytes={offset}-{offset + size - 1}"


def test_an_empty_range_asks_nothing(server) -> None:
    assert quick().read(f"{server.url}/0.tar", 5, 0) == b""
    assert server.requests == []


def test_sizes_and_versions(folder, server) -> None:
    storage = quick()
    for url in (f"{folder}/0.tar", f"{server.url}/0.tar"):
        before = storage.identity(url)
        assert storage.size(url) == before.size == 300_000
        (folder / "0.tar").write_bytes(DATA[::-1])
        os.utime(folder / "0.tar", (1, 1))
        after = storage.identity(url)
        assert after.size == before.size and after.version != before.version
        (folder / "0.tar").write_bytes(DATA)


@pytest.mark.parametrize("faults", [["500", "500"], ["cut", "cut"], ["short", "short"], ["500", "cut", "short", "500", "cut"]])
def test_faults_of_a_server_are_tried_again(server, faults: list[str]) -> None:
    server.faults = list(faults)
    assert quick().read(f"{server.url}/0.tar", 1000, 5000) == DATA[1000:6000]
    assert len(server.requests) == len(faults) + 1


@pytest.mark.parametrize("fault", ["500", "cut", "short"])
def test_a_server_that_keeps_failing_is_named(server, fault: str) -> None:
    server.faults = [fault] * 6
    with pytest.raises(RecipeError, match=rf"{server.url}/0.tar: bytes 0 to 99 could not be read in 6 attempts.*Check"):
        quick().read(f"{server.url}/0.tar", 0, 100)
    assert len(server.requests) == 6


@pytest.mark.parametrize(("fault", "words"), [("404", "is not there.*Correct the path"), ("403", "may not be read.*credentials")])
def test_what_will_not_pass_is_not_tried_again(server, fault: str, words: str) -> None:
    for asks, ask in (
        (1, lambda url: quick().read(url, 0, 100)),
        (2, lambda url: quick().size(url)),
    ):  # a size: by HEAD, then by GET
        server.faults = [fault] * asks
        server.requests.clear()
        with pytest.raises(RecipeError, match=words):
            ask(f"{server.url}/0.tar")
        assert len(server.requests) == asks


def test_a_size_is_asked_again(server) -> None:
    server.faults = ["500"] * 4
    assert quick().size(f"{server.url}/0.tar") == len(DATA)
    server.faults = ["500"] * 12
    with pytest.raises(RecipeError, match="its size could not be read in 6 attempts: 500"):
        quick().size(f"{server.url}/0.tar")


@pytest.mark.parametrize("offset", [0, 1000])
def test_a_server_without_ranges_sends_no_whole_shard(server, offset: int) -> None:
    server.faults = ["no ranges"]
    if offset:
        with pytest.raises(RecipeError, match="no ranged reads"):
            quick().read(f"{server.url}/0.tar", offset, 100)
    else:
        assert quick().read(f"{server.url}/0.tar", offset, 100) == DATA[:100]


def test_no_server_at_all(server) -> None:
    with pytest.raises(RecipeError, match="in 6 attempts"):
        quick().read("http://127.0.0.1:9/0.tar", 0, 10)


def test_waits_grow_and_vary(monkeypatch, server) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    server.faults = ["500"] * 6
    with pytest.raises(RecipeError):
        Storage().read(f"{server.url}/0.tar", 0, 10)
    expected = [0.5, 1, 2, 4, 8]
    waited = [wait for wait in waited if wait > 0.01]  # the server's threads sleep too
    assert len(waited) == 5
    assert all(0.5 * wait <= actual <= 1.5 * wait for wait, actual in zip(expected, waited, strict=True))


@pytest.mark.parametrize(("name", "words"), [("9.tar", "is not there"), (".", "cannot be read")])
def test_local_files_that_are_none(folder, name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        quick().read(f"{folder}/{name}", 0, 1)


def test_a_file_that_was_cut_off_after_its_index_was_made(folder) -> None:
    storage = quick()
    storage.read(f"{folder}/0.tar", 0, 10)
    os.truncate(folder / "0.tar", 1000)
    with pytest.raises(RecipeError, match="has 1000 bytes, but bytes up to 1100 were asked for"):
        storage.read(f"{folder}/0.tar", 900, 200)


def test_faults_of_a_disk_are_tried_again_on_a_new_descriptor(folder, monkeypatch) -> None:
    storage, real, faults = quick(), os.pread, [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]
    used = []

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        used.append(descriptor)
        if faults:
            raise faults.pop()
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert storage.read(f"{folder}/0.tar", 5, 10) == DATA[5:15]
    assert len(used) == 3


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc, which Linux alone has")
def test_few_files_are_open_and_none_after(folder) -> None:
    before = descriptors()
    storage = quick(max_open=2)
    for number in (0, 1, 2, 3, 4, 0, 1, 0):
        assert storage.read(f"{folder}/{number}.tar", number, 10) == DATA[number : number + 10]
        assert descriptors() <= before + 2
    del storage
    assert descriptors() == before


def _read_again(storage: Storage, urls: list[str]) -> bool:
    return all(storage.read(url, 100, 1000) == DATA[100:1100] for url in urls)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_read_with_it(folder, server, start: str) -> None:
    storage, urls = quick(), [f"{folder}/0.tar", f"{server.url}/0.tar"]
    assert _read_again(storage, urls)  # its files and its connection are open before the other process begins
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply_async(_read_again, (storage, urls)).get(timeout=60)
    assert _read_again(storage, urls)


def test_it_may_be_pickled(folder) -> None:
    storage = quick(max_open=3)
    storage.read(f"{folder}/0.tar", 0, 10)
    again = pickle.loads(pickle.dumps(storage))
    assert (again.max_open, again.waits) == (3, storage.waits)
    del storage
    assert again.read(f"{folder}/0.tar", 0, 10) == DATA[:10]


@pytest.mark.parametrize(("url", "words"), [("s3://bucket/0.tar", "pip install s3fs"), ("gs://bucket/0.tar", "pip install gcsfs")])
def test_packages_that_are_not_installed_are_named(monkeypatch, url: str, words: str) -> None:
    monkeypatch.setitem(sys.modules, words.split()[-1], None)
    with pytest.raises(RecipeError, match=words):
        quick().read(url, 0, 10)


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(RecipeError, match="bottle://x/0.tar cannot be read.*https://, s3:// or gs://"):
        quick().read("bottle://x/0.tar", 0, 10)
