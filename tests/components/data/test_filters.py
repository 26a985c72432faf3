"""Filters: what they leave is what img2dataset's own metadata say, sample by sample."""

import json
import os
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from some_shards import pairs, write_shard, write_shards

from components.data.filters import DROPPED, TRAIN, VALIDATION, Filters, open_selection, select
from components.data.metadata import beside, metadata_of, number, text_hash
from components.data.shard_files import in_parallel
from components.data.sources.base import uniform
from components.errors import RecipeError
from components.shards.audit import audit
from components.shards.names import expand
from components.shards.rows import ShardIndex
from components.shards.sample import hash_key
from components.shards.storage import Storage
from tests.components.shards.serving import serving


@pytest.fixture
def shards(tmp_path):
    made = write_shards(tmp_path / "shards")
    return made, indexed(tmp_path)


def indexed(tmp_path):
    names = expand(str(tmp_path / "shards/*.tar"))
    audit(names, tmp_path / "index", 1)
    return ShardIndex.open(tmp_path / "index", names)


def uses_of(index, filters, validation_fraction=0.0, processes=1):
    select(index, filters, validation_fraction, Storage(), processes)
    selection = open_selection(index, filters, validation_fraction)
    return [np.load(selection.files.path(shard, "npy")) for shard in range(len(index.names))], selection


def kept(index, filters):
    return [(uses == TRAIN).tolist() for uses in uses_of(index, filters)[0]]


RULES = {
    "least characters": (Filters(min_characters=20), lambda pair: len(pair.caption) >= 20),
    "most characters": (Filters(max_characters=20), lambda pair: len(pair.caption) <= 20),
    "side": (Filters(min_side=24), lambda pair: min(pair.size) >= 24),
    "aspect": (Filters(max_aspect=1.5), lambda pair: max(pair.size) <= 1.5 * min(pair.size)),
    "open end": (Filters(scores={"similarity": (0.3, None)}), lambda pair: pair.metadata["similarity"] >= 0.3),
    "capitals and gaps": (
        Filters(scores={"punsafe": (None, 0.5)}),
        lambda pair: pair.metadata["PUNSAFE"] is not None and pair.metadata["PUNSAFE"] <= 0.5,
    ),
    "several": (
        Filters(min_characters=20, min_side=12, scores={"similarity": (0.25, 0.35), "PUNSAFE": (0.1, None)}),
        lambda pair: len(pair.caption) >= 20 and min(pair.size) >= 12 and 0.25 <= pair.metadata["similarity"] <= 0.35
        and (pair.metadata["PUNSAFE"] or 0) >= 0.1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("parquet", [True, False], ids=["parquet", "json members"])
def test_a_filter_leaves_what_it_says(rule, parquet, tmp_path):
    made = write_shards(tmp_path / "shards", count=2, parquet=parquet)
    filters, rule = RULES[rule]
    expected = [[rule(pair) for pair in shard] for shard in made]
    assert 0 < sum(map(sum, expected)) < sum(map(len, expected))
    assert kept(indexed(tmp_path), filters) == expected


def test_a_blocklist_of_urls_and_hashes(shards, tmp_path):
    made, index = shards
    blocked = [made[0][3].metadata["url"], made[1][0].metadata["sha256"].upper(), "https://example.org/not_here.jpg"]
    (tmp_path / "optout.txt").write_text("\n".join([*blocked, ""]))
    expected = [[(shard, place) not in ((0, 3), (1, 0)) for place in range(len(made[shard]))] for shard in range(3)]
    assert kept(index, Filters(blocklist=str(tmp_path / "optout.txt"))) == expected


def test_what_a_blocklist_cannot_judge_is_dropped(tmp_path):
    made = write_shards(tmp_path / "shards", count=1)
    other = [pair.metadata | ({"url": None} if place == 4 else {}) for place, pair in enumerate(made[0])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(other), tmp_path / "shards/00000.parquet")
    (tmp_path / "optout.txt").write_text("https://example.org/not_here.jpg\n")
    filters = Filters(blocklist=str(tmp_path / "optout.txt"))
    assert kept(indexed(tmp_path), filters) == [[place != 4 for place in range(len(made[0]))]]


def test_excluded_keys(shards, tmp_path):
    made, index = shards
    file = tmp_path / "exclude.jsonl"
    lines = [{"shard": "00002", "key": made[2][5].key, "kind": "near"}, {"shard": "00000", "key": made[0][6].key}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = [[(shard, place) not in ((2, 5), (0, 6)) for place in range(len(made[shard]))] for shard in range(3)]
    assert kept(index, Filters(exclude=str(file))) == expected


def test_shards_that_moved_are_excluded_alike(shards, tmp_path, monkeypatch):
    """By their names in the index: however the path to them is spelled."""
    made, _ = shards
    file = tmp_path / "exclude.jsonl"
    file.write_text(json.dumps({"shard": "00002", "key": made[2][5].key}))
    monkeypatch.chdir(tmp_path)
    index = ShardIndex.open("index", expand("shards/*.tar"))
    assert sum(map(sum, kept(index, Filters(exclude="exclude.jsonl")))) == sum(map(len, made)) - 1


@pytest.mark.parametrize(
    ("shard", "key", "said"),
    [("00007", "x", "shard 00007"), ("00001", "x", "1 of 1 keys .* shard 00001"), (["00001"], "x", "line 1")],
    ids=str,
)
def test_what_is_excluded_must_be_there(shards, tmp_path, shard, key, said):
    (tmp_path / "exclude.jsonl").write_text(json.dumps({"shard": shard, "key": key}))
    with pytest.raises(RecipeError, match=rf"exclude\.jsonl.*{said}"):
        kept(shards[1], Filters(exclude=str(tmp_path / "exclude.jsonl")))


def test_every_sample_is_counted_once(shards):
    made, index = shards
    filters = Filters(min_characters=20, scores={"similarity": (0.3, None)})
    uses, selection = uses_of(index, filters, validation_fraction=0.2)
    together = Counter(np.concatenate(uses).tolist())
    assert together[DROPPED] == sum(selection.dropped.values()) and together.total() == sum(map(len, made))
    assert together[TRAIN] == selection.train.sum() and together[VALIDATION] == len(selection.held_out)
    short = sum(len(pair.caption) < 20 for shard in made for pair in shard)
    assert selection.dropped["caption too short"] == short
    # the held-out ones are numbered over all shards, and told by their keys
    keys = np.array([hash_key(pair.key) for shard in made for pair in shard], dtype=np.uint64)
    expected = np.flatnonzero((uniform(keys) < 0.2) & (np.concatenate(uses) != DROPPED))
    np.testing.assert_array_equal(selection.held_out, expected)
    for shard in range(3):
        np.testing.assert_array_equal(selection.rows_to_train_on(shard), np.flatnonzero(uses[shard] == TRAIN))


def test_another_filter_or_file_is_another_selection(shards, tmp_path):
    _, index = shards
    file = tmp_path / "optout.txt"
    file.write_text("https://example.org/a.jpg\n")
    hashes = [Filters().hash(0.0), Filters().hash(0.1), Filters(min_side=3).hash(0.0), Filters(blocklist=str(file)).hash(0.0)]
    file.write_text("https://example.org/b.jpg\n")
    hashes.append(Filters(blocklist=str(file)).hash(0.0))
    assert len(set(hashes)) == len(hashes)
    select(index, Filters(), 0.1, Storage(), 1)
    assert open_selection(index, Filters(), 0.2) is None


def test_work_that_was_interrupted_goes_on(shards, monkeypatch):
    _, index = shards
    filters = Filters(min_characters=20)
    whole, selection = uses_of(index, filters)
    done = selection.files.path(0, "npy")
    before = done.stat().st_mtime_ns
    selection.files.path(2, "json").write_text('{"digest')
    cut = selection.files.path(1, "npy")
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(RecipeError, match=r"00001\.select-.* is missing or damaged.*python main\.py index"):
        selection.rows_to_train_on(1)
    selection.files.of_all("json").unlink()
    assert open_selection(index, filters, 0.0) is None
    again, _ = uses_of(index, filters, processes=2)
    assert all(np.array_equal(one, other) for one, other in zip(whole, again, strict=True))
    assert done.stat().st_mtime_ns == before


def test_a_shard_that_was_replaced_is_decided_again(tmp_path):
    write_shards(tmp_path / "shards")
    uses_of(indexed(tmp_path), Filters(min_characters=20))
    made = write_shards(tmp_path / "shards", each=50)
    index = indexed(tmp_path)
    assert open_selection(index, Filters(min_characters=20), 0.0) is None
    assert kept(index, Filters(min_characters=20)) == [[len(pair.caption) >= 20 for pair in shard] for shard in made]


@pytest.mark.parametrize("ending", ["train.npy", "held_out.npy"])
@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-1])])
def test_damaged_files_of_all_shards_are_made_again(shards, ending, damage):
    _, index = shards
    _, selection = uses_of(index, Filters(min_characters=20), 0.2)
    damage(selection.files.of_all(ending))
    assert open_selection(index, Filters(min_characters=20), 0.2) is None
    _, again = uses_of(index, Filters(min_characters=20), 0.2)
    np.testing.assert_array_equal(again.held_out, selection.held_out)


def test_a_shard_without_samples_is_kept_too(tmp_path):
    write_shards(tmp_path / "shards", count=1)
    (tmp_path / "shards" / "00001.tar").write_bytes(b"nothing")
    index = indexed(tmp_path)
    assert index.sizes.tolist() == [30, 0]
    _, selection = uses_of(index, Filters(min_characters=20))
    before = selection.files.path(1, "npy").stat().st_mtime_ns
    _, again = uses_of(index, Filters(min_characters=20))
    assert again.files.path(1, "npy").stat().st_mtime_ns == before


def test_what_cannot_be_written_is_told(shards):
    _, index = shards
    filters = Filters(min_characters=20)
    index.file(0, f"select-{filters.hash(0.0)}.npy").mkdir()
    with pytest.raises(RecipeError, match=r"00000\.select-\w+\.npy could not be written"):
        select(index, filters, 0.0, Storage(), 1)


def rewrite_parquet(file, change):
    records = [change(record) for record in pyarrow.parquet.read_table(file).to_pylist()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)


SIMILAR = Filters(scores={"similarity": (0.3, None)})


def test_metadata_that_changed_decide_again(shards, tmp_path):
    made, index = shards
    before, selection = uses_of(index, SIMILAR)
    untouched = selection.files.path(0, "npy").stat().st_mtime_ns
    rewrite_parquet(tmp_path / "shards/00001.parquet", lambda record: record | {"similarity": 0.35})
    (tmp_path / "shards/00002.parquet").unlink()  # now the .json members say it
    after, selection = uses_of(index, SIMILAR)
    assert after[1].tolist() == [TRAIN] * len(made[1]) != before[1].tolist()
    assert after[2].tolist() == before[2].tolist()
    assert selection.files.path(0, "npy").stat().st_mtime_ns == untouched


def test_json_members_that_changed_decide_again(tmp_path):
    """Their shard has the same rows, byte for byte."""
    made = write_shards(tmp_path / "shards", count=1, parquet=False)
    before, _ = uses_of(indexed(tmp_path), SIMILAR)
    file = tmp_path / "shards/00000.tar"
    content = file.read_bytes()
    changed = content.replace(b'"similarity": 0.2', b'"similarity": 0.9')
    assert changed != content
    file.write_bytes(changed)
    after, _ = uses_of(indexed(tmp_path), SIMILAR)
    assert after[0].tolist() == [TRAIN] * len(made[0]) != before[0].tolist()


@pytest.mark.parametrize("parquet", [True, False])
def test_a_shard_that_cannot_be_read_ends_no_filters(tmp_path, parquet):
    made = write_shards(tmp_path / "shards", count=2, parquet=parquet)
    (tmp_path / "shards/00001.tar").unlink()
    (tmp_path / "shards/00001.tar").symlink_to("nowhere")
    index = indexed(tmp_path)
    assert index.sizes.tolist() == [len(made[0]), 0]
    assert kept(index, SIMILAR)[1] == []


def test_a_store_that_forbids_what_is_not_there(tmp_path):
    """As S3 answers whoever may not list a bucket."""
    made = write_shards(tmp_path / "shards", count=1, parquet=False)
    with serving(tmp_path / "shards") as server:
        audit([f"{server.url}/00000.tar"], tmp_path / "index", 1)
        index = ShardIndex.open(tmp_path / "index", [f"{server.url}/00000.tar"])
        server.faults = ["403"] * 2  # the version of the .parquet: by HEAD, then by GET
        storage = Storage(waits=())
        assert beside(index.names[0], ".parquet", storage) is None
        server.faults = []
        assert kept(index, SIMILAR) == [[pair.metadata["similarity"] >= 0.3 for pair in made[0]]]


HOSTILE = {
    "nested": b"[" * 100_000,
    "a number without end": b'{"similarity": 1' + b"0" * 400 + b"}",
    "half a character": b'{"similarity": 0.9, "url": "\\ud800"}',
    "a list": b'{"similarity": [1], "url": ["a"]}',
    "no JSON": b'{"similarity',
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_json_members_are_as_no_metadata(tmp_path, hostile):
    made = pairs(0, 4)
    write_shard(tmp_path / "shards", "00000", made, parquet=False, members={made[1].key: HOSTILE[hostile]})
    (tmp_path / "optout.txt").write_text("https://example.org/a.jpg\n")
    filters = Filters(scores={"similarity": (0.1, None)}, blocklist=str(tmp_path / "optout.txt"))
    assert kept(indexed(tmp_path), filters) == [[True, False, True, True]]


@pytest.mark.parametrize("key", [7, None])
def test_keys_of_metadata_that_are_no_texts(tmp_path, key):
    made = write_shards(tmp_path / "shards", count=1)
    rewrite_parquet(tmp_path / "shards/00000.parquet", lambda record: record | {"key": key})
    index = indexed(tmp_path)
    if key is None:
        with pytest.raises(RecipeError, match="column similarity"):
            kept(index, SIMILAR)
        return
    with pytest.raises(RecipeError, match=r"00000\.tar.*column key holds int64"):
        kept(index, SIMILAR)
    assert made


@pytest.mark.parametrize("data", [b"", b"noise", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_broken_parquet_is_told(tmp_path, data):
    write_shards(tmp_path / "shards", count=1)
    (tmp_path / "shards/00000.parquet").write_bytes(data)
    with pytest.raises(RecipeError, match=r"parquet beside .*00000\.tar.*cannot be read: .*Restore it or remove it"):
        kept(indexed(tmp_path), SIMILAR)


def test_metadata_are_held_as_numbers(shards):
    _, index = shards
    columns = {"url": text_hash, "similarity": number}
    metadata = metadata_of(index, 0, columns, Storage())
    assert {type(value) for values in metadata.columns.values() for value in values} == {int, float}


def test_a_process_that_dies_is_told():
    with pytest.raises(RecipeError, match="hashes: a process ended .*fewer --processes"):
        list(in_parallel(lambda number: os._exit(9) if number else number, range(4), 2, "hashes"))
    assert list(in_parallel(lambda number: number**2, range(5), 2, "squares")) == [0, 1, 4, 9, 16]


def test_mistakes_are_told(shards, tmp_path):
    _, index = shards
    with pytest.raises(RecipeError, match=r"column nsfw.*scores"):
        select(index, Filters(scores={"NSFW": (None, 0.5)}), 0.0, Storage(), 1)
    (tmp_path / "optout.txt").write_text("https://example.org/a.jpg\nexample.org/b.jpg\n")
    with pytest.raises(RecipeError, match=r"optout\.txt line 2: 'example\.org/b\.jpg'"):
        select(index, Filters(blocklist=str(tmp_path / "optout.txt")), 0.0, Storage(), 1)
    (tmp_path / "overlaps.jsonl").write_text('{"shard": "a"}\n')
    with pytest.raises(RecipeError, match=r"overlaps\.jsonl line 1"):
        select(index, Filters(exclude=str(tmp_path / "overlaps.jsonl")), 0.0, Storage(), 1)
    with pytest.raises(RecipeError, match="cannot be read"):
        Filters(blocklist=str(tmp_path / "nowhere.txt")).hash(0.0)


@pytest.mark.parametrize(
    "stated",
    [
        {"min_characters": 0}, {"min_characters": 9, "max_characters": 8}, {"max_characters": 70000}, {"min_side": 0},
        {"max_aspect": 0.5}, {"max_aspect": float("nan")}, {"scores": {"similarity": (None, None)}},
        {"scores": {"similarity": (0.5, 0.3)}}, {"scores": {"similarity": (float("nan"), None)}},
        {"scores": {"similarity": (0.1, float("nan"))}},
    ],
    ids=str,
)  # fmt: skip
def test_filters_that_mean_nothing_are_refused(stated):
    with pytest.raises(RecipeError, match="filters:"):
        Filters(**stated)
