"""Files that are whole as soon as they are there: no half a file, nothing left behind, and reasons people can act on."""

import os
import stat
from pathlib import Path

import pytest

from components.atomic import save
from components.errors import RecipeError


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "facts"
    save(path, lambda file: file.write(b"first"))
    assert path.read_bytes() == b"first"

    def interrupted(file):
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"first"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(path, interrupted)
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]


def test_two_that_write_one_file_at_once_disturb_neither(tmp_path):
    """Machines that share a file system share numbers of processes as well."""
    path = tmp_path / "facts"

    def meanwhile(file):
        file.write(b"outer")
        save(path, lambda other: other.write(b"inner"))

    save(path, meanwhile)
    assert path.read_bytes() == b"outer" and list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_they_may_read_of_any_file(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "facts", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "facts").stat().st_mode) == 0o640


def test_names_as_long_as_a_file_system_takes(tmp_path):
    save(tmp_path / ("n" * 255), lambda file: file.write(b"x"))


@pytest.mark.parametrize("reason", ["a file in place of the folder", "a folder in place of the file", "no permission", "no space"])
def test_a_file_that_cannot_be_written(tmp_path, reason):
    def write(file):
        if reason == "no space":
            with Path("/dev/full").open("wb") as full:
                full.write(b"x")

    path = tmp_path / "folder" / "facts"
    if reason == "a file in place of the folder":
        path.parent.write_text("")
    elif reason == "a folder in place of the file":
        path.mkdir(parents=True)
    elif reason == "no permission":
        path = Path("/proc/folder/facts")  # nobody may write there, root neither
    with pytest.raises(RecipeError, match=r"facts could not be written.*Free space there.*write permission"):
        save(path, write)
    assert not list(tmp_path.rglob("*.tmp"))
