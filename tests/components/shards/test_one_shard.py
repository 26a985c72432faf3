"""The audit of one shard: usable samples become rows, everything else is named, and memory stays bounded."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.errors import BadSample
from components.shards.one_shard import audit_shard
from components.shards.rows import Audit
from components.shards.sample import JSON_CAPTION, hash_key, read_caption, read_sample
from components.shards.storage import Storage
from tests.components.shards import hostile_shards
from tests.components.shards.counting import CountingStorage
from tests.components.shards.hostile_shards import HOSTILE, picture, sample, samples, tar
from tests.components.shards.serving import serving

ROOT = Path(__file__).parents[3]


def audited(folder: Path, data: bytes) -> tuple[Audit, np.ndarray, str]:
    path = folder / "0.tar"
    path.write_bytes(data)
    found, rows = audit_shard(str(path), "0", Storage())
    assert found.samples == len(rows)
    return found, rows, str(path)


def keys(rows: np.ndarray) -> list[int]:
    return rows["key"].tolist()


def test_rows_of_a_whole_shard(tmp_path) -> None:
    members = [(f"{name}.{extension}", content) for name, extension, content in [
        ("a/1", "jpg", picture(1, 300, 200)), ("a/1", "txt", b" caf\xc3\xa9 \n"),
        ("a/2", "json", json.dumps({"caption": "from JSON"}).encode()), ("a/2", "PNG", picture(2, 10, 20, "PNG")),
        ("a/3", "txt", b"text first"), ("a/3", "seg.png", b"not the picture"), ("a/3", "webp", picture(3, 31, 17, "WEBP")),
        ("a/4", "jpeg", picture(4)), ("a/4", "json", b"broken, but not asked"), ("a/4", "txt", b"x" * 70_000),
    ]]  # fmt: skip
    found, rows, path = audited(tmp_path, tar(members))
    assert found.problems == [] and found.counts == {}
    assert keys(rows) == [hash_key(f"a/{number}") for number in (1, 2, 3, 4)]
    assert rows["width"].tolist() == [300, 10, 31, 64]
    assert rows["height"].tolist() == [200, 20, 17, 48]
    assert rows["characters"].tolist() == [4, 9, 10, 65_535]
    assert (rows["flags"] & JSON_CAPTION).tolist() == [0, 1, 0, 0]
    read = [read_sample(Storage(), path, row) for row in rows]
    contents = dict(members)
    assert [pair.image for pair in read] == [contents[name] for name in ("a/1.jpg", "a/2.PNG", "a/3.webp", "a/4.jpeg")]
    assert [pair.key for pair in read] == ["a/1", "a/2", "a/3", "a/4"]
    assert [pair.caption for pair in read] == ["café", "from JSON", "text first", "x" * 70_000]
    assert [read_caption(Storage(), path, row) for row in rows] == [pair.caption for pair in read]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_with_long_names_are_read_by_their_rows(tmp_path, format: int) -> None:
    members = [("folder/" * 40 + name, content) for name, content in samples(3)]
    found, rows, path = audited(tmp_path, tar(members, format))
    assert found.counts == {} and len(rows) == 3
    assert [read_sample(Storage(), path, row).caption for row in rows] == ["caption 0", "caption 1", "caption 2"]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_shards(tmp_path, case: str) -> None:
    make, kind, remaining = HOSTILE[case]
    found, rows, path = audited(tmp_path, make())
    assert kind in found.counts
    assert kind in [problem.kind for problem in found.problems]
    assert keys(rows) == [hash_key(key) for key in remaining]
    for row, key in zip(rows, remaining, strict=True):
        assert read_sample(Storage(), path, row) == (key, picture(int(key)), f"caption {int(key)}")


def test_a_duplicate_is_named_and_the_first_one_kept(tmp_path) -> None:
    found, _, _ = audited(tmp_path, hostile_shards.duplicate_key())
    (problem,) = found.problems
    assert (problem.kind, problem.key) == ("duplicate key", "000001")
    found, rows, path = audited(tmp_path, tar(sample(1) + sample(1, "again") + sample(1, "and again")))  # neighbors
    assert found.counts == {"duplicate key": 2}
    assert read_sample(Storage(), path, rows[0]).caption == "caption 1"


def test_names_that_lead_outside_extract_nothing(tmp_path) -> None:
    """Such names are harmless here: they are keys, and no file is ever made of them."""
    (tmp_path / "in").mkdir()
    before = sorted(tmp_path.rglob("*"))
    found, rows, path = audited(tmp_path / "in", hostile_shards.outside_names())
    assert [read_sample(Storage(), path, row).caption for row in rows] == ["up", "root"]
    assert found.counts == {}
    assert sorted(tmp_path.rglob("*")) == [*before, Path(path)]
    assert not Path("/etc/inside.jpg").exists()


def test_files_that_begin_with_a_dot_are_none_of_a_sample(tmp_path) -> None:
    """As webdataset has it; an archive made on macOS has one before each file."""
    members = [entry for name, content in samples(3) for entry in ((f"._{name}", b"attributes"), (name, content))]
    members = [(f"./{name}", content) for name, content in [*members, (".DS_Store", b"x")]]
    found, rows, path = audited(tmp_path, tar(members))
    assert found.counts == {}
    assert [read_sample(Storage(), path, row) for row in rows] == [
        (f"./{number:06d}", picture(number), f"caption {number}") for number in range(3)
    ]


def test_a_bomb_is_refused_by_its_header(tmp_path) -> None:
    found, _, _ = audited(tmp_path, hostile_shards.bomb())
    assert found.problems[0].key == "000000"
    assert "limit" in found.problems[0].reason


def test_a_picture_whose_size_stands_behind_long_metadata(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x9286] = "x" * 60_000
    file = io.BytesIO()
    Image.new("RGB", (123, 45)).save(file, "JPEG", exif=exif, icc_profile=bytes(400_000), comment=b"y" * 60_000)
    assert file.getvalue().find(b"\xff\xc0") > 2**18
    found, rows, _ = audited(tmp_path, tar([("0.jpg", file.getvalue()), ("0.txt", b"text")]))
    assert found.counts == {}
    assert (rows["width"][0], rows["height"][0]) == (123, 45)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"caption": null}', "empty"), (b'{"caption": "  "}', "empty"), (b"[1]", "not a JSON object"),
        (b"{", "not a JSON object"), (b"[" * 100_000, "not a JSON object"), (b'{"caption": "\\ud800"}', "surrogate"),
        (b'{"caption": "a\\u0000"}', "NUL"), (b'{"caption": "' + b"x" * 100_001 + b'"}', "100,001 characters"),
        (b'{"x": "' + b"x" * 2**20 + b'"}', "the limit is 1,048,576"),
    ],
)  # fmt: skip
def test_captions_in_json_that_are_none(tmp_path, content: bytes, reason: str) -> None:
    found, rows, _ = audited(tmp_path, tar([("0.jpg", picture()), ("0.json", content), *sample(1)]))
    assert found.counts == {"bad caption": 1}
    assert reason in found.problems[0].reason
    assert len(rows) == 1


def test_a_shard_that_changed_after_its_audit_is_noticed(tmp_path) -> None:
    _, rows, path = audited(tmp_path, tar(samples(3)))
    Path(path).write_bytes(tar(samples(4)[3:]))
    with pytest.raises(BadSample, match=r"changed after its index was made.*holds '000001.jpg'"):
        read_sample(Storage(), path, rows[0])
    Path(path).write_bytes(tar(samples(3)))
    assert read_sample(Storage(), path, rows[0]).caption == "caption 0"
    Path(path).write_bytes(os.urandom(len(tar(samples(3)))))
    with pytest.raises(BadSample, match="holds no member"):
        read_sample(Storage(), path, rows[1])


def test_a_caption_that_was_damaged_after_the_audit_is_a_bad_sample(tmp_path) -> None:
    _, rows, path = audited(tmp_path, tar(samples(1)))
    data = bytearray(Path(path).read_bytes())
    data[int(rows[0]["image_offset"]) + int(rows[0]["text_offset"])] = 0xFF
    Path(path).write_bytes(data)
    with pytest.raises(BadSample, match="not UTF-8"):
        read_sample(Storage(), path, rows[0])


def test_behind_a_url_as_on_disk(tmp_path) -> None:
    _, rows, path = audited(tmp_path, tar(samples(30)))
    with serving(tmp_path) as server:
        _, remote = audit_shard(f"{server.url}/0.tar", "0", Storage())
        assert len(server.requests) == 3  # its size, all of it, its size again
        np.testing.assert_array_equal(remote, rows)
        server.requests.clear()
        assert read_sample(Storage(), f"{server.url}/0.tar", rows[7]) == read_sample(Storage(), path, rows[7])
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("kilobytes", "count", "most"), [((15, 200), 600, 1.001), ((2000, 9000), 12, 1.001), ((17_000, 20_000), 3, 1.02)]
)
def test_no_part_of_a_shard_is_read_twice(tmp_path, kilobytes: tuple[int, int], count: int, most: float) -> None:
    sizes = np.random.default_rng(0).integers(*kilobytes, count) * 1000
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, size in enumerate(sizes.tolist()):
            for extension, content in (("jpg", picture() + bytes(size)), ("json", b"{}"), ("txt", b"caption")):
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    storage = CountingStorage()
    found, _ = audit_shard(str(path), "0", storage)
    assert found.samples == count and not found.counts
    share = storage.read_bytes / path.stat().st_size
    print(f"{path.stat().st_size:,} bytes; read {share:.3f} times, in {storage.reads} pieces")
    assert share < most


def test_what_is_kept_of_a_shard_is_bounded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("components.shards.one_shard.MAX_SAMPLES", 3)
    monkeypatch.setattr("components.shards.one_shard.MAX_PROBLEMS", 2)
    found, rows, _ = audited(tmp_path, tar(samples(5)))
    assert found.counts == {"too many samples": 1} and len(rows) == 3
    found, _, _ = audited(tmp_path, tar([("k" * 90 + f"{number}.txt", b"x") for number in range(5)]))
    assert found.counts == {"missing picture": 5} and len(found.problems) == 2


MEMORY = """
import sys
from pathlib import Path
from components.shards.one_shard import audit_shard
from components.shards.storage import Storage

def memory(which):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0])

before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
found, rows = audit_shard(sys.argv[1], "0", Storage())
print(memory("VmHWM") - before, found.samples, found.counts)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory in /proc, which Linux alone has")
@pytest.mark.parametrize(
    "case", ["a member of 10 GB", "long captions", "tiny members", "one key", "zeros", "bad pictures", "many samples"]
)
def test_memory_is_bounded(tmp_path, case: str) -> None:
    path = tmp_path / "0.tar"
    with path.open("wb") as file:
        if case == "a member of 10 GB":
            info = tarfile.TarInfo("0.jpg")
            info.size = 10 * 2**30
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(info.size, os.SEEK_CUR)
            file.write(tar(samples(3)))
        elif case == "zeros":
            file.write(tar(samples(3)))
            file.truncate(4 * 2**30)
        elif case == "long captions":
            file.write(tar([member for number in range(200) for member in sample(number, b"word " * 200_000)]))
        elif case == "bad pictures":
            noise = b"\xff\xd8\xff\xe0" + os.urandom(30 * 2**20)
            file.write(tar([(f"{number}.{extension}", noise) for number in range(20) for extension in ("jpg", "txt")]))
        elif case == "many samples":
            small = picture(0, 16, 16)
            for number in range(200_000):
                for name, content in ((f"{number}.jpg", small), (f"{number}.txt", b"x")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    file.write(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
        else:
            for number in range(300_000):
                name = f"{number}.txt" if case == "tiny members" else f"0.x{number}"
                info = tarfile.TarInfo(name)
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
    shown = subprocess.run([sys.executable, "-c", MEMORY, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    kilobytes, used = shown.stdout.split(maxsplit=1)
    print(f"{case}: {int(kilobytes) // 1024} MB more; {used}")
    assert int(kilobytes) < 100 * 1024  # 156 MB at the 1,000,000 samples that are the limit


@pytest.mark.parametrize("seed", range(15))
def test_what_survives_damage_can_be_read(tmp_path, seed: int) -> None:
    random = np.random.default_rng(seed)
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    data = bytearray(tar([(f"{'n' * 60}/{name}", content) for name, content in samples(8)], formats[seed % 3]))
    start, size = int(random.integers(0, len(data) * 3 // 4)), int(random.integers(1, 6000))
    data[start : start + size] = (b"", bytes(size), random.bytes(size))[seed % 5 % 3]
    found, rows, path = audited(tmp_path, bytes(data))
    assert found.counts or len(rows) == 8
    for row in rows:
        assert read_sample(Storage(), path, row).image
