"""Pictures of evaluations: found in folders and archives, read once, and what is broken or hostile among them."""

import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from components.data import evaluation_pictures
from components.data.evaluation_pictures import read_evaluation_pictures
from components.errors import RecipeError
from tests.components.data.copies import encoded, jpeg, photograph, write_evaluation


@pytest.fixture
def evaluation(tmp_path) -> Path:
    return write_evaluation(tmp_path / "evaluation")


def test_evaluation_pictures_are_read_once(tmp_path, evaluation, monkeypatch):
    first = read_evaluation_pictures([evaluation], 2)
    monkeypatch.setattr("components.data.evaluation_pictures.picture_gray", None)
    again = read_evaluation_pictures([evaluation], 1)
    np.testing.assert_array_equal(again.digests, first.digests)
    assert again.files == first.files
    assert again.broken == first.broken
    np.testing.assert_array_equal(again.grays, first.grays)
    (evaluation / "3.PNG").write_bytes(encoded(photograph(8), "PNG"))
    with pytest.raises(TypeError):  # it is not what was kept
        read_evaluation_pictures([evaluation], 1)


def test_what_is_kept_may_be_damaged(evaluation):
    first = read_evaluation_pictures([evaluation], 1)
    kept = evaluation_pictures._cache_file(evaluation_pictures._files(evaluation))
    kept.write_bytes(kept.read_bytes()[:-100])
    np.testing.assert_array_equal(read_evaluation_pictures([evaluation], 1).digests, first.digests)


def test_an_archive_alone_and_links_to_folders(tmp_path, evaluation):
    assert len(read_evaluation_pictures([evaluation / "val.zip"], 1).files) == 2
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "there").symlink_to(evaluation / "artwork")
    (linked / "there" / "back").symlink_to(linked)  # a circle ends
    assert len(read_evaluation_pictures([linked], 1).files) == 3


def test_folders_without_pictures_are_refused(tmp_path, evaluation):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("nothing")
    with pytest.raises(RecipeError, match=r"There is no folder .*absent of evaluation pictures"):
        read_evaluation_pictures([evaluation, tmp_path / "absent"], 1)
    with pytest.raises(RecipeError, match=r"empty \(--against\) holds no picture"):
        read_evaluation_pictures([tmp_path / "empty"], 1)
    (tmp_path / "empty" / "one.jpg").write_bytes(b"noise")
    with pytest.raises(RecipeError, match="None of the 1 evaluation pictures can be used"):
        read_evaluation_pictures([tmp_path / "empty"], 1)
    (tmp_path / "empty" / "bad.zip").write_bytes(b"PK\3\4 noise")
    with pytest.raises(RecipeError, match=r"archive .*bad\.zip of evaluation pictures .* cannot be read"):
        read_evaluation_pictures([tmp_path / "empty"], 1)


def test_hostile_evaluation_pictures_are_broken_ones(tmp_path, evaluation):
    with zipfile.ZipFile(evaluation / "hostile.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("huge.jpg", bytes(33 * 2**20))
        archive.writestr("damaged.jpg", jpeg(0))
        archive.writestr("modest.jpg", bytes(64 * 2**20))
        archive.writestr("other.jpg", jpeg(1), zipfile.ZIP_BZIP2)
    data = bytearray((evaluation / "hostile.zip").read_bytes())
    at = data.index(b"damaged.jpg") + 200
    data[at : at + 50] = bytes(50)
    size = (64 * 2**20).to_bytes(4, "little")
    data = data.replace(size, (1000).to_bytes(4, "little"))  # what the archive claims of modest.jpg
    (evaluation / "hostile.zip").write_bytes(data)
    del data
    tracemalloc.start()
    pictures = read_evaluation_pictures([evaluation / "hostile.zip", evaluation / "artwork"], 1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 60 * 2**20
    for broken, said in zip(
        pictures.broken,
        ("damaged.jpg: it cannot be read", "huge.jpg: it has 34603008 bytes", "modest.jpg: ", "other.jpg: .*compressed"),
        strict=True,
    ):
        assert re.search(said, broken)
