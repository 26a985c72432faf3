"""The index on disk: rows of shards, their summary, and refusing what does not belong together."""

import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from components.errors import RecipeError
from components.shards.names import names_in_index
from components.shards.rows import ROW, SUMMARY, Audit, ShardIndex, read_audit, write_shard, write_summary
from components.shards.storage import Storage
from components.shards.tar import Problem


def rows(count: int) -> np.ndarray:
    made = np.zeros(count, ROW)
    made["key"] = np.random.default_rng(count).integers(0, 2**63, count)
    return made


def audit(name: str, samples: int = 3, **options) -> Audit:
    return Audit(name, f"d/{name}.tar", 1000, "7", samples, f"{samples:032x}", **options)


def made(folder: Path, shards: list[str], sizes: list[int]) -> ShardIndex:
    audits = [audit(name, size) for name, size in zip(names_in_index(shards), sizes, strict=True)]
    for entry in audits:
        write_shard(folder, entry, rows(entry.samples))
    write_summary(folder, audits)
    return ShardIndex.open(folder, shards)


def test_a_row_has_36_bytes() -> None:
    assert ROW.itemsize == 36


def test_what_is_written_is_read(tmp_path) -> None:
    index = made(tmp_path, ["d/0.tar", "d/1.tar", "d/2.tar"], [3, 0, 5])
    assert index.names == ["d/0.tar", "d/1.tar", "d/2.tar"]
    np.testing.assert_array_equal(index.sizes, [3, 0, 5])
    for number, size in enumerate([3, 0, 5]):
        np.testing.assert_array_equal(index.rows(number), rows(size))
        assert isinstance(index.rows(number), np.memmap) or size == 0
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(index)).rows(2), rows(5))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_shards_of_one_name_in_two_folders_are_nested(tmp_path) -> None:
    index = made(tmp_path, ["d/a/0.tar", "d/b/0.tar"], [3, 4])
    assert (tmp_path / "b/0.rows.npy").is_file()
    assert len(index.rows(1)) == 4


def test_audits_are_read_again(tmp_path) -> None:
    entry = audit("0", counts={"link": 2}, problems=[Problem("link", "0", 5, "a link"), Problem("link", "\udce9", 9, "a link")])
    write_shard(tmp_path, entry, rows(3))
    assert read_audit(tmp_path, "0") == entry
    assert read_audit(tmp_path, "1") is None
    (tmp_path / "0.rows.npy").write_bytes(b"\x93NUMPY cut off")
    assert read_audit(tmp_path, "0") is None


@pytest.mark.parametrize(
    ("shards", "words"),
    [(["d/0.tar"], r"has 1 others \(1 ...\)"), (["d/0.tar", "d/1.tar", "d/2.tar"], r"lacks 1 of them \(2 ...\)")],
)
def test_an_index_of_other_shards_is_refused(tmp_path, shards: list[str], words: str) -> None:
    made(tmp_path, ["d/0.tar", "d/1.tar"], [3, 4])
    with pytest.raises(RecipeError, match=f"{words}.*python main.py index"):
        ShardIndex.open(tmp_path, shards)


def test_the_same_shards_in_another_order_are_refused(tmp_path) -> None:
    made(tmp_path, ["d/a/1.tar", "d/b/0.tar"], [3, 4])
    with pytest.raises(RecipeError, match=r"it has them in another order. Run python main.py index"):
        ShardIndex.open(tmp_path, ["d/0.tar", "d/1.tar"])


def test_the_fingerprint_tells_names_sizes_and_rows(tmp_path) -> None:
    prints = set()
    for shards, sizes in ((["d/0.tar", "d/1.tar"], [3, 4]), (["d/0.tar", "d/1.tar"], [4, 3]), (["d/0.tar", "d/2.tar"], [3, 4])):
        prints.add(made(tmp_path, shards, sizes).fingerprint)
    assert len(prints) == 3
    assert made(tmp_path, ["moved/0.tar", "moved/1.tar"], [3, 4]).fingerprint in prints  # the same shards in another place


def test_no_index_and_a_damaged_one(tmp_path) -> None:
    with pytest.raises(RecipeError, match="There is no index in .*python main.py index"):
        ShardIndex.open(tmp_path, ["d/0.tar"])
    made(tmp_path, ["d/0.tar"], [3])
    whole = (tmp_path / SUMMARY).read_bytes()
    for damaged in (whole[:100], b"garbage", whole.replace(b"samples.npy", b"simples.npy")):
        (tmp_path / SUMMARY).write_bytes(damaged)
        with pytest.raises(RecipeError, match=r"shards.npz is damaged. Run python main.py index --shards d/0.tar --index .*kept"):
            ShardIndex.open(tmp_path, ["d/0.tar"])
    (tmp_path / SUMMARY).unlink()
    (tmp_path / SUMMARY).mkdir()
    with pytest.raises(RecipeError, match=r"shards.npz cannot be read: Is a directory"):
        ShardIndex.open(tmp_path, ["d/0.tar"])


def test_rows_that_are_gone_or_cut_off(tmp_path) -> None:
    index = made(tmp_path, ["d/0.tar", "d/1.tar"], [3, 4])
    path = tmp_path / "0.rows.npy"
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "1.rows.npy").unlink()
    for shard in (0, 1):
        with pytest.raises(RecipeError, match=rf"{shard}.rows.npy, the rows of shard d/{shard}.tar, is missing or damaged"):
            index.rows(shard)


def test_a_shard_of_another_size_is_stale(tmp_path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(bytes(1000))
    index = made(tmp_path / "index", [str(shard)], [3])
    index.check(0, Storage())
    shard.write_bytes(bytes(2000))
    with pytest.raises(
        RecipeError, match=r"0.tar has 2000 bytes; when its index was made it had 1000.*python main.py index --shards"
    ):
        index.check(0, Storage())


def test_few_rows_are_mapped_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("components.shards.rows._OPEN_ROWS", 2)
    index = made(tmp_path, [f"d/{number}.tar" for number in range(4)], [3, 4, 5, 6])
    for shard in (0, 1, 2, 3, 0, 0, 1):
        assert len(index.rows(shard)) == shard + 3
        assert len(index._rows) <= 2


def test_the_summary_of_75000_shards_opens_at_once(tmp_path) -> None:
    shards = [f"/lustre/laion/part/{number:05d}.tar" for number in range(75_000)]
    write_summary(tmp_path, [audit(name, 8000) for name in names_in_index(shards)])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        index = ShardIndex.open(tmp_path, shards)
        seconds.append(time.process_time() - start)
    print(f"opened {index.sizes.sum():,} samples in {min(seconds):.3f} s")
    assert min(seconds) < 0.5  # 0.08 s on an idle core


@pytest.mark.parametrize("reason", ["a file in place of the folder", "no permission"])
def test_a_folder_that_cannot_be_written(tmp_path, reason: str) -> None:
    folder = tmp_path / "index"
    if reason == "no permission":
        folder = Path("/proc/index")  # nobody may write there, root neither
    else:
        folder.write_text("")
    with pytest.raises(RecipeError, match=r"index.* could not be written.*Free space there"):
        write_shard(folder, audit("0"), rows(3))
