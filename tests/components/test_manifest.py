"""The manifest of a checkpoint: what is missing or damaged is told by file."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch

from components.manifest import damaged_files, file_facts, hashed_file, read_manifest, what_is_missing, write_manifest


@pytest.fixture
def folder(tmp_path):
    files = {}
    (tmp_path / "state").mkdir()
    with hashed_file(tmp_path / "state" / "weights", "state/weights", files) as stream:
        torch.save({"weights": torch.arange(1_000_000)}, stream)
    with hashed_file(tmp_path / "recipe.yaml", "recipe.yaml", files) as stream:
        stream.write(b"model: tiny\n")
    write_manifest(tmp_path, step=7, ranks=1, files=files)
    return tmp_path


def test_a_hashed_file_is_the_file_and_its_hash_is_that_of_others(folder):
    assert torch.equal(torch.load(folder / "state/weights")["weights"], torch.arange(1_000_000))
    for name, facts in read_manifest(folder).items():
        assert facts.size == (folder / name).stat().st_size
        told = subprocess.run(["sha256sum", str(folder / name)], capture_output=True, text=True, check=True).stdout
        assert told.split()[0] == facts.sha256 == file_facts(folder / name).sha256


def test_many_small_writes_and_large_ones_are_hashed_in_their_order(tmp_path):
    pieces = [bytes([number % 251]) * size for number, size in enumerate([1, 5, 3 << 20, 0, 7, 1 << 20, 2])]
    files = {}
    with hashed_file(tmp_path / "file", "file", files) as stream:
        for piece in pieces:
            stream.write(piece)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert files["file"].sha256 == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_a_complete_folder(folder):
    assert what_is_missing(folder) is None
    assert damaged_files(folder) == []
    content = json.loads((folder / "manifest.json").read_text())
    assert content["step"] == 7
    assert torch.__version__.startswith(content["versions"]["torch"])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {"a": '), "its manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 1}'), "its manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": ["a"]}'), "its manifest.json is damaged"),
        (lambda folder: (folder / "recipe.yaml").unlink(), "recipe.yaml is missing"),
        (lambda folder: (folder / "recipe.yaml").write_text("model:"), "recipe.yaml has 6 bytes instead of 12"),
    ],
)
def test_what_is_missing_is_told(folder, harm, words):
    harm(folder)
    assert what_is_missing(folder) == words


def test_one_bit_is_found_by_the_hashes_alone(folder):
    content = bytearray((folder / "state/weights").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state/weights").write_bytes(content)
    assert what_is_missing(folder) is None
    assert damaged_files(folder) == ["state/weights"]
    assert damaged_files(folder, ["recipe.yaml"]) == damaged_files(folder, []) == []


def test_a_file_that_cannot_be_written_has_no_facts():
    files = {}
    with pytest.raises(OSError, match="No space left"), hashed_file(Path("/dev/full"), "full", files) as stream:
        stream.write(b"x")
    assert files == {}
