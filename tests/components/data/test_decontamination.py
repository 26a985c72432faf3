"""Decontamination: copies of evaluation pictures among training pictures are found, others are not."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from components.data import decontamination, overlaps
from components.data.decontamination import (
    Overlaps,
    find_overlaps,
    find_overlaps_of_annotations,
    find_overlaps_of_dataset,
    overlaps_of,
)
from components.data.evaluation_pictures import read_evaluation_pictures
from components.data.filters import DROPPED, TRAIN, Filters, Select
from components.data.overlaps import PICTURE, Search, hash_pictures
from components.data.sources import HuggingFaceDataset, QuestionAnswers
from components.errors import RecipeError
from components.shards.audit import audit
from components.shards.rows import ShardIndex
from components.shards.storage import Storage
from tests.components.data.copies import encoded, jpeg, photograph, small, write_evaluation
from tests.components.data.small_data import shapes

STORAGE = Storage(waits=())


@pytest.fixture
def evaluation(tmp_path) -> Path:
    return write_evaluation(tmp_path / "evaluation")


def write_tar(path: Path, pictures: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, data in pictures.items():
            for name, content in ((f"{key}.jpg", data), (f"{key}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def indexed(folder: Path, shards: list[dict[str, bytes]]) -> ShardIndex:
    paths = [str(folder / f"{number:05d}.tar") for number in range(len(shards))]
    for path, pictures in zip(paths, shards, strict=True):
        write_tar(Path(path), pictures)
    audit(paths, folder / "index", 1, progress=False, storage=STORAGE)
    return ShardIndex.open(folder / "index", paths)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def triples(found: Overlaps, evaluation: Path) -> list[tuple[str, str, str]]:
    return [(o["key"], str(Path(o["picture"]).relative_to(evaluation)), o["kind"]) for o in records(found.overlaps)]


LONG = "a/" + "very_long_name_" * 10


def test_copies_in_shards_are_found_and_listed(tmp_path, evaluation):
    shards = [
        {"0000": jpeg(0), "0001": jpeg(7), "0002": small(3), "0003": jpeg(8)[:1000]},
        {"1000": jpeg(8), LONG: small(5), "1002": jpeg(6), "1003": encoded(photograph(10), "PNG")},
    ]
    index = indexed(tmp_path, shards)
    found = find_overlaps(index, STORAGE, [evaluation], 8, tmp_path / "out", processes=2)
    assert triples(found, evaluation) == [
        ("0000", "artwork/0.jpg", "exact"),
        ("0002", "3.PNG", "near"),
        (LONG, "val.zip/val/5.jpg", "near"),
        ("1002", "val.zip/val/6.jpg", "exact"),
    ]
    assert (found.evaluation, found.pictures, found.unreadable, found.exact, found.near, found.found) == (7, 8, 1, 2, 2, 4)
    assert [line.split(": ")[0] for line in found.broken] == [
        str(evaluation / "broken.jpg"),
        str(evaluation / "val.zip/val/empty.jpg"),
    ]
    assert records(found.without) == [
        {"shard": f"0000{shard}", "key": key, "kind": kind}
        for shard, key, kind in ((0, "0000", "exact"), (0, "0002", "near"), (1, "1002", "exact"), (1, LONG, "near"))
    ]
    filters = Filters(exclude=str(found.without))
    used = [Select(index, filters, 0.0, STORAGE)(shard)[0].tolist() for shard in range(2)]
    assert used == [[DROPPED, TRAIN, DROPPED, TRAIN], [TRAIN, DROPPED, DROPPED, TRAIN]]
    assert f"filters: {{exclude: {tmp_path / 'out' / 'exclude.jsonl'}}}" in found.lines()[1]
    assert "4 training samples show 4 of 7 evaluation pictures: 2 exact, 2 near. 8 training pictures were" in found.lines()[0]
    assert any(line.startswith("1 training pictures cannot be decoded") for line in found.lines())
    assert sum("broken.jpg" in line for line in found.lines()) == 1
    text = found.page.read_text()
    assert text.count("<img") == 8
    assert "5.jpg" in text


def test_broken_pictures_of_equal_bytes_are_not_looked_for(tmp_path, evaluation):
    found = find_overlaps(
        indexed(tmp_path, [{"0": jpeg(9)[:1000], "1": jpeg(8)[:1000]}]), STORAGE, [evaluation], 8, tmp_path / "out", 1
    )
    assert (found.exact, found.near, found.unreadable, found.pictures) == (0, 0, 2, 2)
    assert found.overlaps.read_text() == found.without.read_text() == ""


def test_distance_zero_finds_fewer(tmp_path, evaluation):
    index = indexed(tmp_path, [{"0": jpeg(0), "1": encoded(photograph(1).crop((3, 3, 198, 150)), quality=50)}])
    assert find_overlaps(index, STORAGE, [evaluation], 8, tmp_path / "out", 1).near == 1
    assert find_overlaps(index, STORAGE, [evaluation], 0, tmp_path / "out", 1).near == 0


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path, evaluation, monkeypatch):
    index = indexed(tmp_path, [{"0": jpeg(0)}, {"1": small(1)}, {"2": jpeg(2)}])
    done: list[int] = []

    def twice(pictures: Iterable[bytes]) -> np.ndarray:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(done))
        return hash_pictures(pictures)

    monkeypatch.setattr(decontamination, "hash_pictures", twice)
    with pytest.raises(KeyboardInterrupt):
        find_overlaps(index, STORAGE, [evaluation], 8, tmp_path / "out", 1)
    done.clear()
    found = find_overlaps(index, STORAGE, [evaluation], 8, tmp_path / "out", 1)
    assert len(done) == 1  # only the third shard
    assert [kind for *_, kind in triples(found, evaluation)] == ["exact", "near", "exact"]
    done.clear()
    other = tmp_path / "other"
    other.mkdir()
    (other / "one.jpg").write_bytes(small(2))
    found = find_overlaps(index, STORAGE, [other], 8, tmp_path / "out", 1)
    assert not done  # another evaluation reads no shard again
    assert triples(found, other) == [("2", "one.jpg", "near")]


def test_what_cannot_be_written_is_told(tmp_path, evaluation):
    (tmp_path / "out" / "overlaps.jsonl").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"overlaps\.jsonl could not be written"):
        find_overlaps(indexed(tmp_path, [{"0": jpeg(0)}]), STORAGE, [evaluation], 8, tmp_path / "out", 1)


def test_a_shard_that_changed_is_refused(tmp_path, evaluation):
    index = indexed(tmp_path, [{"0": jpeg(0)}])
    write_tar(tmp_path / "00000.tar", {"0": jpeg(0), "1": jpeg(1)})
    with pytest.raises(RecipeError, match=r"00000\.tar has"):
        find_overlaps(index, STORAGE, [evaluation], 8, tmp_path / "out", 1)


def test_a_long_shard_is_read_in_pieces(tmp_path, monkeypatch):
    tiny = encoded(Image.new("RGB", (8, 8)))
    pictures = {str(number): tiny + bytes([number]) * (number * 97 % 700) for number in range(40)}
    index = indexed(tmp_path, [pictures])
    for piece in (1, 1500, 10**9):
        monkeypatch.setattr(decontamination, "_READ_AT_ONCE", piece)
        assert list(decontamination._pictures_of_shard(index, STORAGE, 0)) == list(pictures.values())


def test_hashes_name_unreadable_pictures():
    hashed = hash_pictures(iter([jpeg(0), b"noise", jpeg(1)] * 100))
    assert hashed.dtype == PICTURE
    assert hashed["decoded"].tolist() == [True, False, True] * 100
    assert hashed["digest"][1] == int.from_bytes(hashlib.sha256(b"noise").digest()[:8], "little")
    assert len(np.unique(hashed["hash"][hashed["decoded"]])) == 2


def test_copies_in_a_llava_file_are_found(tmp_path, evaluation):
    images = tmp_path / "images"
    images.mkdir()
    (images / "same.jpg").write_bytes(jpeg(2))
    (images / "small.jpg").write_bytes(small(4))
    (images / "other.jpg").write_bytes(jpeg(8))
    says = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    lines = [
        {"id": "a", "image": "same.jpg", "conversations": says},
        {"id": "b", "image": "other.jpg", "conversations": says},
        {"id": "c", "image": ["other.jpg", "small.jpg"], "conversations": says},
        {"id": "d", "image": "same.jpg", "conversations": says},
        {"id": "e", "conversations": says},
        {"id": "f", "image": "absent.jpg", "conversations": says},
        {"id": "g", "image": 7, "conversations": says},
        {"question_id": 3, "image": "small.jpg", "text": "What?", "answer": "This."},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(lines))
    found = find_overlaps_of_annotations(tmp_path / "llava.json", images, [evaluation], 8, tmp_path / "out", 1)
    assert triples(found, evaluation) == [
        ("a", "artwork/2.jpg", "exact"),
        ("c", "4.webp", "near"),
        ("d", "artwork/2.jpg", "exact"),
        ("7", "4.webp", "near"),
    ]
    assert (found.exact, found.near, found.pictures, found.unreadable) == (2, 2, 4, 1)
    assert [record["id"] for record in records(found.without)] == ["b", "e", "f", "g"]
    assert f"annotations: {tmp_path / 'out' / 'kept.jsonl'}" in found.lines()[1]
    assert found.page.read_text().count("<img") == 8


def test_copies_in_a_dataset_are_found_and_left_out(tmp_path, evaluation):
    datasets.disable_progress_bars()
    several = [[jpeg(8)], [jpeg(8), small(4)], [], [jpeg(10)], [jpeg(2), jpeg(0)[:300]]]
    texts = [{"user": "What?", "assistant": f"This {number}."} for number in range(len(several))]
    made = [
        {"images": [{"bytes": data, "path": None} for data in images], "texts": [text]}
        for images, text in zip(several, texts, strict=True)
    ]
    datasets.Dataset.from_list(made).save_to_disk(str(tmp_path / "saved"))
    source = HuggingFaceDataset(str(tmp_path / "saved"))
    found = find_overlaps_of_dataset(source, [evaluation], 8, tmp_path / "out", 1)
    assert triples(found, evaluation) == [("1", "4.webp", "near"), ("4", "artwork/2.jpg", "exact")]
    assert (found.exact, found.near, found.pictures, found.unreadable) == (1, 1, 6, 1)
    assert f"exclude: {tmp_path / 'out' / 'exclude.jsonl'}" in found.lines()[1]
    without = HuggingFaceDataset(str(tmp_path / "saved"), exclude=str(found.without), validation_fraction=0.5)
    without.setup()
    indices = [*without.train_indices(np.arange(without.num_samples)), *without.validation_indices]
    samples = [without.sample(int(index), np.random.default_rng(0)) for index in indices]
    assert sorted(sample.turns[1].text for sample in samples) == ["This 0.", "This 2.", "This 3."]
    assert sorted(sample.id for sample in samples) == ["0", "2", "3"]
    assert without.lengths(np.arange(3), 100).tolist() == [103, 3, 103]
    source.setup()
    assert without.fingerprint() != source.fingerprint()
    assert find_overlaps_of_dataset(without, [evaluation], 8, tmp_path / "again", 1).exact == 1
    assert records(found.without) == [
        {"shard": "saved:None", "row": 1, "kind": "near"},
        {"shard": "saved:None", "row": 4, "kind": "exact"},
    ]
    for row, shard in ((5, "saved:None"), (-1, "saved:None"), (True, "saved:None"), (1.0, "saved:None"), (1, "saved:train")):
        found.without.write_text(json.dumps({"shard": shard, "row": row}))
        with pytest.raises(RecipeError, match=rf"excludes row {row} of '{shard}'; this dataset is 'saved:None', with rows 0 to 4"):
            without.setup()
    found.without.write_text("nothing")
    with pytest.raises(RecipeError, match=r"exclude\.jsonl \(exclude\) is no list of records"):
        without.setup()


def test_every_kind_of_source_says_what_it_shares(tmp_path, evaluation):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(small(0))
    record = {"image": "0.jpg", "text": "What?", "answer": "This."}
    (tmp_path / "questions.jsonl").write_text(json.dumps(record) + "\n")
    questions = QuestionAnswers(str(tmp_path / "questions.jsonl"), str(tmp_path / "images"))
    found = overlaps_of(questions, [evaluation], 8, tmp_path / "out", 1)
    assert found[0].startswith("1 training samples show 1 of 7 evaluation pictures: 0 exact, 1 near.")
    assert (tmp_path / "out" / "kept.jsonl").read_text() == ""
    drawn = overlaps_of(shapes(), [evaluation], 8, tmp_path / "out", 1)
    assert len(drawn) == 1
    assert drawn[0].endswith("are not compared with those of evaluations")


def test_nearly_uniform_pictures_overlap_only_with_their_like(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    Image.new("RGB", (60, 60), (250, 250, 250)).save(folder / "white.png")
    shards = [
        {"white": encoded(Image.new("RGB", (90, 70), (251, 250, 250))), "gray": encoded(Image.new("RGB", (90, 70), (90, 90, 90)))}
    ]
    found = find_overlaps(indexed(tmp_path, shards), STORAGE, [folder], 8, tmp_path / "out", 1)
    assert triples(found, folder) == [("white", "white.png", "near")]


def test_many_that_are_only_near_are_warned_of(tmp_path):
    found = Overlaps(9, [], 999, 0, 10, 101, 5, *[tmp_path] * 3, "")
    assert "101 near are many more than 10 exact" in "\n".join(found.lines())
    for exact, near in ((11, 101), (0, 100)):
        assert "many more" not in "\n".join(replace(found, exact=exact, near=near).lines())


def test_many_equal_pictures_are_compared_once(tmp_path):
    """As blank ones, of which an evaluation and a shard may both have thousands."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for number in range(300):
        Image.new("L", (8 + number % 9, 8 + number % 7), 255).save(folder / f"{number}.png")
    search = Search(read_evaluation_pictures([folder], 1), 8)
    assert len(search.table.hashes) == 1
    blank = encoded(Image.new("RGB", (50, 40), (255, 255, 255)))
    matches, found = search.matches(hash_pictures(iter([blank] * 300)), lambda row: blank)
    assert len(matches) == 300 * 16
    assert found == set(range(300))


def test_a_shard_that_cannot_be_read_ends_no_search(tmp_path, evaluation):
    index = indexed(tmp_path, [{"0": jpeg(0)}, {}])
    (tmp_path / "00001.tar").unlink()
    assert find_overlaps(index, STORAGE, [evaluation], 8, tmp_path / "out", 1).exact == 1


def test_overlaps_of_one_picture_are_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(overlaps, "_MOST", 3)
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for quality in (50, 60, 70, 80, 90):
        (folder / f"{quality}.jpg").write_bytes(jpeg(0, quality))
    found = find_overlaps(indexed(tmp_path, [{"0": jpeg(0, 80)}]), STORAGE, [folder], 8, tmp_path / "out", 1)
    assert len(triples(found, folder)) == 3
    assert found.found == 5  # all count
    assert ("0", "80.jpg", "exact") in triples(found, folder)
