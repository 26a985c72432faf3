"""The audit of many shards: in parallel, begun again where it was ended, and ended by no shard."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from components.errors import RecipeError
from components.shards.audit import audit, problems_of, repeated_keys
from components.shards.one_shard import audit_shard
from components.shards.rows import SUMMARY, ShardIndex, read_audit
from components.shards.storage import Storage
from tests.components.shards.hostile_shards import HOSTILE, samples, tar, whole
from tests.components.shards.serving import serving

ROOT = Path(__file__).parents[3]
IMPATIENT = Storage(waits=())


def shards(folder: Path, count: int) -> list[str]:
    """Shards of three samples each; of shard 1 the keys are those of shard 0."""
    paths = []
    for number in range(count):
        path = folder / f"{number:05d}.tar"
        members = samples(3 * max(number, 1))[-9:]
        path.write_bytes(tar(members))
        paths.append(str(path))
    return paths


def test_the_index_of_shards(tmp_path) -> None:
    paths = shards(tmp_path, 5)
    found = audit(paths[::-1], tmp_path / "index", 2, progress=False)
    assert [(one.url, one.samples, one.counts) for one in found] == [(path, 3, {}) for path in paths]
    index = ShardIndex.open(tmp_path / "index", paths)
    np.testing.assert_array_equal(index.sizes, [3] * 5)
    for number, path in enumerate(paths):
        np.testing.assert_array_equal(index.rows(number), audit_shard(path, "x", Storage())[1])
        assert read_audit(tmp_path / "index", f"{number:05d}") == found[number]
    assert repeated_keys(index) == 3


def test_repeated_keys_are_not_looked_for_in_more_than_memory_holds(tmp_path, monkeypatch) -> None:
    paths = shards(tmp_path, 2)
    audit(paths, tmp_path / "index", 1, progress=False)
    monkeypatch.setattr("components.shards.audit.MAX_KEYS", 5)
    assert repeated_keys(ShardIndex.open(tmp_path / "index", paths)) is None


def test_only_what_is_new_or_changed_is_read_again(tmp_path) -> None:
    paths = shards(tmp_path, 4)
    folder = tmp_path / "index"
    audit(paths, folder, 2, progress=False)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (tmp_path / "00001.tar").write_bytes(tar(samples(2)))
    (folder / "00002.rows.npy").unlink()
    paths.append(str(tmp_path / "00009.tar"))
    (tmp_path / "00009.tar").write_bytes(whole())
    found = audit(paths, folder, 2, progress=False)
    assert [one.samples for one in found] == [3, 2, 3, 3, 5]
    again = {path.name for path in folder.iterdir() if written.get(path.name) != path.stat().st_mtime_ns}
    names = {f"{number:05d}.{suffix}" for number in (1, 2, 9) for suffix in ("rows.npy", "audit.json")}
    assert again == names | {SUMMARY}


def test_every_hostile_shard_is_reported_and_none_ends_the_audit(tmp_path) -> None:
    expected = {}
    for number, (make, kind, remaining) in enumerate(HOSTILE.values()):
        path = tmp_path / f"{number:05d}.tar"
        path.write_bytes(make())
        expected[str(path)] = (kind, len(remaining))
    expected |= {str(tmp_path / "missing.tar"): ("unreadable", 0), str(tmp_path / "folder.tar"): ("unreadable", 0)}
    (tmp_path / "folder.tar").mkdir()
    found = audit(list(expected), tmp_path / "index", 2, progress=False)
    for one in found:
        kind, remaining = expected[one.url]
        assert kind in one.counts and one.samples == remaining, one
    index = ShardIndex.open(tmp_path / "index", list(expected))
    assert index.sizes.sum() == sum(remaining for _, remaining in expected.values())
    for number, size in enumerate(index.sizes):
        assert len(index.rows(number)) == size


def test_a_shard_that_could_not_be_read_is_tried_again(tmp_path) -> None:
    paths = shards(tmp_path, 2)
    with serving(tmp_path) as server:
        urls = [f"{server.url}/{Path(path).name}" for path in paths]
        server.faults = ["500"] * 2  # asked for its size by HEAD and by GET
        found = audit(urls, tmp_path / "index", 1, progress=False, storage=IMPATIENT)
        assert sorted(sum(one.counts.values()) for one in found) == [0, 1]
        assert [one.samples for one in audit(urls, tmp_path / "index", 1, progress=False, storage=IMPATIENT)] == [3, 3]


class Deadly(Storage):
    """A storage whose process dies when it reads one of the shards, as in a crash of a picture library."""

    def read(self, url: str, offset: int, size: int) -> bytes:
        if url.endswith("00003.tar"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(url, offset, size)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_process_that_dies_ends_only_its_shard(tmp_path, processes: int) -> None:
    paths = shards(tmp_path, 8)
    found = audit(paths, tmp_path / "index", processes, progress=False, storage=Deadly())
    assert [one.samples for one in found] == [3, 3, 3, 0, 3, 3, 3, 3]
    assert found[3].counts == {"unreadable": 1} and "died" in found[3].problems[0].reason


def test_an_index_that_cannot_be_written_is_an_error(tmp_path) -> None:
    (tmp_path / "index").write_text("")
    with pytest.raises(RecipeError, match="could not be written"):
        audit(shards(tmp_path, 3), tmp_path / "index", 2, progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of the size of files is Linux's")
def test_a_full_disk_is_an_error_and_what_is_finished_stays(tmp_path) -> None:
    paths, folder = shards(tmp_path, 3), tmp_path / "index"
    audit(paths[:2], folder, 1, progress=False)
    Path(paths[2]).write_bytes(tar(samples(400)))  # its rows are larger than the disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(RecipeError, match=r"00002.rows.npy could not be written: .*File too large.*Free space there"):
            audit(paths, folder, 2, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in folder.glob("*.audit.json")) == ["00000.audit.json", "00001.audit.json"]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert [one.samples for one in audit(paths, folder, 2, progress=False)] == [3, 3, 400]


def test_a_server_without_ranges_is_said_in_the_audit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("components.shards.one_shard._PIECE", 2**14)
    Path(tmp_path / "0.tar").write_bytes(whole())
    with serving(tmp_path) as server:
        server.faults = [""] + ["no ranges"] * 10
        (found,) = audit([f"{server.url}/0.tar"], tmp_path / "index", 1, progress=False, storage=IMPATIENT)
    assert found.counts == {"unreadable": 1} and "no ranged reads" in found.problems[0].reason


def test_an_index_is_not_replaced_by_one_of_other_shards(tmp_path) -> None:
    paths, folder = shards(tmp_path, 3), tmp_path / "index"
    audit(paths[:2], folder, 1, progress=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for others in (paths[:1], paths[1:]):
        with pytest.raises(
            RecipeError, match=r"is one of other shards, of which 1 .*are not among .*another folder.*or remove .*npz"
        ):
            audit(others, folder, 1, progress=False)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(audit(paths, folder, 1, progress=False)) == 3
    (folder / SUMMARY).write_bytes(b"damaged")
    assert len(audit(paths[1:], folder, 1, progress=False)) == 2


def test_problems_are_in_the_files_not_in_memory(tmp_path) -> None:
    paths = [*shards(tmp_path, 2), str(tmp_path / "missing.tar")]
    Path(paths[1]).write_bytes(tar([("k" * 90 + f"{number}.txt", b"x") for number in range(300)]))
    found = audit(paths, tmp_path / "index", 2, progress=False)
    assert [len(one.problems) for one in found] == [0, 0, 1]  # what could not be read has no file
    assert [len(problems_of(tmp_path / "index", one)) for one in found] == [0, 300, 1]


def test_progress_counts_samples_and_problems(tmp_path, capsys) -> None:
    paths = shards(tmp_path, 3)
    Path(paths[0]).write_bytes(HOSTILE["missing caption"][0]())
    audit(paths, tmp_path / "index", 1)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "samples=7" in shown and "problems=1" in shown


def test_progress_counts_in_whole_numbers(tmp_path, capsys) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(tar(samples(1234)))
    audit([str(path)], tmp_path / "index", 1)
    assert "samples=1,234" in capsys.readouterr().err


SLOWLY = """
import sys, time
from components.shards.audit import audit
from components.shards.storage import Storage

class Slow(Storage):
    def read(self, url, offset, size):
        time.sleep(0.2)
        return super().read(url, offset, size)

audit(sys.argv[2:], sys.argv[1], 2, progress=False, storage=Slow())
"""


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc, which Linux alone has")
@pytest.mark.parametrize(
    "end",
    [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_what_is_finished_stays_when_it_is_killed(tmp_path, end: signal.Signals) -> None:
    paths, folder = shards(tmp_path, 40), tmp_path / "index"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(folder), *paths], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list(folder.glob("*.audit.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(end)
    process.wait(timeout=20)
    for _ in range(100):
        if not any(Path(f"/proc/{worker}").exists() for worker in workers):
            break
        time.sleep(0.05)
    assert len(workers) == 2 and not any(Path(f"/proc/{worker}").exists() for worker in workers)  # nobody works on for nobody
    assert not (folder / SUMMARY).exists()
    with pytest.raises(RecipeError, match="There is no index"):
        ShardIndex.open(folder, paths)
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.audit.json")}
    assert 3 <= len(finished) < 40
    audit(paths, folder, 2, progress=False)
    assert ShardIndex.open(folder, paths).sizes.sum() == 120
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
