"""The walk over an archive: equal to Python's tarfile on whole ones, and nothing lost but what is broken."""

import io
import os
import tarfile

import numpy as np
import pytest

from components.shards.tar import BLOCK, Member, Problem, walk
from tests.components.shards import hostile_shards
from tests.components.shards.hostile_shards import HOSTILE, sample, samples, tar

NAMES = {
    "plain": "000000.jpg",
    "long": "a" * 150 + ".jpg",
    "very long": "folder/" * 60 + "b" * 120 + ".jpg",
    "prefix": "folder_of_some_length/" * 9 + "c.jpg",
    "not ASCII": "größe_雪_😀.jpg",
    "long and not ASCII": "雪" * 90 + ".jpg",
    "up": "../../x.jpg",
    "absolute": "/etc/x.jpg",
}


def walked(data: bytes) -> tuple[list[Member], list[Problem]]:
    found = list(walk(lambda offset, size: data[offset : offset + size], len(data)))
    return [entry for entry in found if isinstance(entry, Member)], [entry for entry in found if isinstance(entry, Problem)]


def listed(data: bytes) -> list[tuple[str, int, int]]:
    """Name, offset and size of plain files as Python's tarfile finds them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [(member.name, member.offset_data, member.size) for member in archive if member.isfile()]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("names", [[name] for name in NAMES] + [list(NAMES)], ids="+".join)
def test_the_walk_equals_tarfile(format: int, names: list[str]) -> None:
    random = np.random.default_rng(0)
    members = [(NAMES[name], random.bytes(int(random.integers(0, 2000)))) for name in names]
    if format == tarfile.USTAR_FORMAT:
        members = [(name, content) for name, content in members if name.isascii() and (len(name) < 100 or "folder_of" in name)]
    data = tar(members, format)
    found, problems = walked(data)
    assert [(member.name, member.offset, member.size) for member in found] == listed(data)
    assert problems == []
    assert all(member.header % BLOCK == 0 and member.header < member.offset for member in found)
    assert [member.header for member in found][1:] == [-(-(member.offset + member.size) // BLOCK) * BLOCK for member in found][:-1]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_other_members_are_passed_over(format: int) -> None:
    file = io.BytesIO()
    kinds = [
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CONTTYPE,
        tarfile.AREGTYPE,
    ]
    headers = {"comment": "for all members"} if format == tarfile.PAX_FORMAT else None
    with tarfile.open(fileobj=file, mode="w", format=format, pax_headers=headers) as archive:
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{number}" * 120)
            info.type, info.linkname, info.size = kind, "target" * 30, 700 if kind in tarfile.REGULAR_TYPES else 0
            info.mtime = 0.5  # a pax header of its own
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    data = file.getvalue()
    found, problems = walked(data)
    assert [(member.name, member.offset, member.size) for member in found] == listed(data)
    assert len(found) == 2
    assert [problem.kind for problem in problems] == ["symbolic link", "hard link"]


def test_pax_sizes_and_gnu_binary_sizes_count() -> None:
    """What does not fit into 11 octal digits; the archive is a hole, read through a stub."""
    size = 9 * 2**30
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("huge.bin")
        info.size = size
        headers = info.tobuf(format)
        rest = tar([("small.jpg", b"x")])
        start = len(headers) + size

        def read(offset: int, count: int, headers=headers, start=start, rest=rest) -> bytes:
            if offset < len(headers):
                return headers[offset : offset + count]
            return rest[offset - start : offset - start + count]

        found = list(walk(read, start + len(rest)))
        assert [(member.name, member.offset, member.size) for member in found] == [
            ("huge.bin", len(headers), size),
            ("small.jpg", start + BLOCK, 1),
        ]


def test_the_writer_of_webdataset(tmp_path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="comes with the extra bench; archives of tarfile are compared above")
    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(3):
            writer.write({"__key__": f"sub/{number:09d}", "jpg": bytes(number), "txt": "a caption", "json": {"number": number}})
    found, problems = walked(path.read_bytes())
    assert [(member.name, member.offset, member.size) for member in found] == listed(path.read_bytes())
    assert len(found) == 9 and problems == []


@pytest.mark.parametrize(
    "case",
    ["truncated", "truncated between members", "zeroed blocks", "zeros to the end", "bad header", "huge size", "symbolic link"],
)
def test_a_broken_archive_loses_only_what_is_broken(case: str) -> None:
    make, kind, remaining = HOSTILE[case]
    found, problems = walked(make())
    assert [problem.kind for problem in problems] == [kind]
    names = {member.name for member in found}
    assert {f"{key}.{extension}" for key in remaining for extension in ("jpg", "json", "txt")} <= names


@pytest.mark.parametrize(("case", "words"), [("web page", "a web page"), ("gzip", "gunzip")])
def test_what_is_no_tar_says_what_it_is(case: str, words: str) -> None:
    found, (problem,) = walked(HOSTILE[case][0]())
    assert found == []
    assert problem.kind == "not a tar" and words in problem.reason


@pytest.mark.parametrize("data", [b"", b"<Error>", os.urandom(5000), bytes(5000), bytes(512) + b"x" * 512])
def test_anything_else_has_no_members(data: bytes) -> None:
    found, problems = walked(data)
    assert found == []
    assert [problem.kind for problem in problems] == (
        [] if not any(data) and data else ["zero block" if data[:1] == b"\0" else "not a tar"]
    )


def test_how_much_was_passed_over_is_said() -> None:
    whole, zeroed = hostile_shards.whole(), hostile_shards.zeroed_blocks()
    lost = hostile_shards.header_of(whole, "000003.jpg") - hostile_shards.header_of(whole, "000002.jpg")
    assert f" {lost} bytes were passed over" in walked(zeroed)[1][0].reason


def test_concatenated_archives_are_read_to_the_end() -> None:
    found, problems = walked(tar(samples(2)) + tar(sample(2)))
    assert [member.name for member in found] == [name for name, _ in samples(3)]
    assert [problem.kind for problem in problems] == ["zero block"]


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_never_raises_and_ends(seed: int) -> None:
    random = np.random.default_rng(seed)
    data = bytearray(tar([(NAMES["very long"], b"x"), *samples(3), (NAMES["long and not ASCII"], b"y" * 600)], tarfile.PAX_FORMAT))
    for at in random.integers(0, len(data), 40):
        data[at] = random.integers(0, 256)
    data = bytes(data[: random.integers(1, len(data))])
    found, _ = walked(data)
    assert all(member.offset >= BLOCK and member.offset + member.size <= len(data) for member in found)


def test_an_endless_pax_header_is_refused() -> None:
    data = tar([("x" * 70_000 + ".jpg", b"x"), *sample(1)], tarfile.PAX_FORMAT)
    found, problems = walked(data)
    assert [problem.kind for problem in problems] == ["bad header"]
    assert [member.name for member in found][1:] == [name for name, _ in sample(1)]
