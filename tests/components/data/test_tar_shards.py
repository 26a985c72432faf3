"""Tar shards as a source: every pair once, as it stands in the shard, and mistakes told before anything trains."""

import os
import pickle
import shutil

import numpy as np
import pytest
from small_data import assert_equal_batches, opened
from some_shards import write_shard, write_shards

from components.data import TarShards
from components.data.filters import Filters, select
from components.errors import BadSample, RecipeError
from components.shards.audit import audit
from components.shards.names import expand

RANDOM = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "shards")
    index(tmp_path)
    return tmp_path


def index(folder):
    audit(expand(str(folder / "shards/*.tar")), folder / "index", 1)


def source_of(folder, **options):
    return TarShards(str(folder / "shards/{00000..00002}.tar"), str(folder / "index"), **options)


def decided(folder, **options):
    """The source with its samples selected, as the index command does."""
    source = source_of(folder, **options)
    source.open_index()
    select(source.rows_of, source.filters, source.validation_fraction, source.storage, 1)
    source.setup()
    return source


def test_every_pair_is_there_as_it_was_written(folder):
    made = write_shards(folder / "shards")
    source = source_of(folder)
    source.setup()
    assert source.shard_sizes.tolist() == [30, 35, 40] and source.num_samples == 105 and not len(source.validation_indices)
    indices = source.train_indices(np.arange(105))
    samples = [source.sample(int(index), RANDOM) for index in indices]
    pairs = [pair for shard in made for pair in shard]
    assert [sample.id for sample in samples] == [pair.key for pair in pairs]
    assert [sample.images for sample in samples] == [[pair.picture] for pair in pairs]
    said = [[(turn.role, turn.text) for turn in sample.turns] for sample in samples]
    assert said == [[("user", "<image>"), ("assistant", pair.caption)] for pair in pairs]
    assert [source.text(int(index), RANDOM)[1:] for index in indices] == [(sample.turns, 1) for sample in samples]
    assert source.where(30 + 34).endswith("00001.tar, sample 34")


def test_filters_and_held_out_samples_share_the_rest(folder):
    made = write_shards(folder / "shards")
    options = {"filters": Filters(min_characters=20), "validation_fraction": 0.2}
    source = decided(folder, **options)
    random_order = np.random.default_rng(1).permutation(source.num_samples)
    indices = source.train_indices(random_order)
    train, held_out = set(indices.tolist()), set(source.validation_indices.tolist())
    pairs = [pair for shard in made for pair in shard]
    assert len(train) == source.num_samples and held_out and not train & held_out
    assert train | held_out == {number for number, pair in enumerate(pairs) if len(pair.caption) >= 20}
    # numbers count shard by shard
    ends = np.cumsum([30, 35, 40])
    shards = np.searchsorted(ends, source.train_indices(np.arange(source.num_samples)), side="right")
    assert np.bincount(shards).tolist() == source.shard_sizes.tolist()
    again = source_of(folder, **options)
    again.setup()
    assert again.fingerprint() == source.fingerprint() != decided(folder, validation_fraction=0.2).fingerprint()


def test_a_worker_reads_the_same(folder):
    source = decided(folder, filters=Filters(min_characters=20))
    numbers = np.arange(source.num_samples)
    before = [source.sample(int(index), RANDOM) for index in source.train_indices(numbers)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.sample(int(index), RANDOM) for index in copy.train_indices(numbers)] == before
    assert len(pickle.dumps(source)) < 20_000


def test_batches_of_worker_processes(folder):
    batches = []
    for workers in (0, 2):
        data = opened({"pairs": decided(folder)}, folder, template="plain", num_workers=workers)
        batches.append(list(data.train_dataloader()))
    assert len(batches[0]) == 6
    for one, other in zip(*batches, strict=True):
        assert not one.bad_samples
        assert_equal_batches(one, other)


def test_what_is_missing_is_told_with_the_command(folder):
    with pytest.raises(RecipeError, match=r"python main\.py index --config RECIPE"):
        source_of(folder, filters=Filters(min_side=9)).setup()
    shutil.rmtree(folder / "index")
    with pytest.raises(RecipeError, match=r"no index in .*python main\.py index"):
        source_of(folder).setup()
    with pytest.raises(RecipeError, match=r"nowhere"):
        TarShards(str(folder / "nowhere/*.tar"), str(folder / "index")).setup()
    with pytest.raises(RecipeError, match="window 0"):
        source_of(folder, window=0)


def test_a_changed_shard_is_noticed(folder):
    source = source_of(folder)
    source.setup()
    made = write_shards(folder / "elsewhere", count=1, each=40)
    write_shard(folder / "shards", "00001", made[0][5:])
    with pytest.raises(RecipeError, match=r"00001\.tar changed after its index was made\. Run .*index --shards") as error:
        source.sample(30, RANDOM)
    assert not isinstance(error.value, BadSample)
    before = source.fingerprint()
    index(folder)
    source.setup()
    assert source.fingerprint() != before


def test_a_damaged_header_costs_its_sample_alone(folder):
    source = source_of(folder)
    source.setup()
    row = source.rows_of.rows(1)[3]
    path = folder / "shards/00001.tar"
    content = bytearray(path.read_bytes())
    content[int(row["image_offset"]) - 512] ^= 1  # the first character of the picture's name
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=times)
    with pytest.raises(BadSample, match=r"00001\.tar, sample 3: It changed after its index was made"):
        source.sample(33, RANDOM)
    assert [source.sample(index, RANDOM).id for index in (32, 34)] == ["000010002", "000010004"]


def test_filters_that_leave_nothing_are_told(folder):
    with pytest.raises(RecipeError, match="no sample is left"):
        decided(folder, filters=Filters(min_side=60_000))
