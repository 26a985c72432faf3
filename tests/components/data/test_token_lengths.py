"""Measured lengths are those of the documents that training makes, sample by sample."""

import pickle

import numpy as np
import pytest
from small_data import LAYOUT, SHAPES, TOKENIZER, opened
from some_shards import write_shards

from components.batch import SampleFormat
from components.data import HuggingFaceDataset, LlavaConversations, Preparation, ShapesWorld, TarShards
from components.data.token_lengths import UNUSABLE, Measure, measure, open_lengths
from components.errors import BadSample, RecipeError
from components.shards.audit import audit
from components.shards.names import expand
from components.tokenizer import WordTokenizer

PLAIN = Preparation("plain", "upright", "pad", max_length=2048)
BRIEF = Preparation("brief", "upright", "pad", max_length=2048)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def said(question, answer, *more):
    turns = [question, answer, *more]
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]


@pytest.fixture
def conversations(pictures, write):
    records = [
        {"id": "one", "image": "p0.png", "conversations": said("<image>\nwhat is it", "a red ball")},
        {"id": "turns", "image": "p1.png", "conversations": said("<image>\nwhat", "a", "and here", "nothing", "sure", "yes")},
        {"id": "text", "conversations": said("how are you", "very well, thank you")},
        {"id": "two", "image": ["p2.png", "p3.png"], "conversations": said("<image> or <image>?", "the first")},
        {"id": "broken", "image": "p4.png", "conversations": said("no placeholder", "none")},
        {"id": "long", "image": "p5.png", "conversations": said("<image>\nwhat", "a", "x " * 300, "b " * 300)},
        {"id": "too long", "image": "p5.png", "conversations": said("<image>\nwhat", "a " * 900)},
    ]
    source = LlavaConversations(write("own.json", records), pictures)
    source.setup()
    return source


@pytest.fixture
def shards(tmp_path):
    write_shards(tmp_path / "shards", count=2)
    audit(expand(str(tmp_path / "shards/*.tar")), tmp_path / "index", 1)
    source = TarShards(str(tmp_path / "shards/*.tar"), str(tmp_path / "index"))
    source.setup()
    return source


def expected(source, preparation, count):
    lengths = []
    for index in range(count):
        try:
            sample = source.sample(index, np.random.default_rng(0))
            lengths.append(len(preparation.document(sample, TOKENIZER, LAYOUT).input_ids))
        except BadSample:
            lengths.append(UNUSABLE)
    return lengths


@pytest.mark.parametrize("processes", [1, 2])
def test_lengths_of_conversations(conversations, processes):
    work = Measure(conversations, Preparation("brief", "upright", "pad", max_length=300), TOKENIZER, LAYOUT)
    assert open_lengths(work) is None
    measure(work, processes, "own")
    indices = np.arange(7)
    lengths = open_lengths(work)(indices)
    assert lengths.tolist() == expected(conversations, work.preparation, 7)
    assert lengths[4] == UNUSABLE == lengths[6] and 0 < lengths[5] <= 300 and lengths[3] > 2 * LAYOUT.tokens_per_image
    assert open_lengths(work)(indices[::-2]).tolist() == lengths[::-2].tolist()


@pytest.mark.parametrize("processes", [1, 2])
def test_lengths_of_shards(shards, processes):
    work = Measure(shards, PLAIN, TOKENIZER, LAYOUT)
    assert open_lengths(work) is None
    measure(work, processes, "pairs")
    count = shards.num_samples
    lengths = open_lengths(work)(np.arange(count))
    assert lengths.tolist() == expected(shards, PLAIN, count) and min(lengths) > LAYOUT.tokens_per_image
    order = np.random.default_rng(1).permutation(count)
    assert open_lengths(work)(order).tolist() == lengths[order].tolist()
    shards.measured = pickle.loads(pickle.dumps(open_lengths(work)))  # as a worker receives it
    assert shards.lengths(order, LAYOUT.tokens_per_image).tolist() == lengths[order].tolist()


def test_damaged_lengths_of_shards_are_measured_again(shards):
    work = Measure(shards, PLAIN, TOKENIZER, LAYOUT)
    measure(work, 1, "pairs")
    lengths = open_lengths(work)
    cut = lengths.files.path(1, "npy")
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(RecipeError, match=r"00001\.tokens-.* is missing or damaged.*python main\.py index"):
        lengths(np.arange(shards.num_samples))
    measure(work, 1, "pairs")
    assert open_lengths(work)(np.arange(shards.num_samples)).tolist() == expected(shards, PLAIN, shards.num_samples)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:60]])
def test_damaged_lengths_of_a_file_are_measured_again(conversations, damage):
    work = Measure(conversations, BRIEF, TOKENIZER, LAYOUT)
    measure(work, 1, "own")
    path = open_lengths(work).path
    path.write_bytes(damage(path.read_bytes()))
    assert open_lengths(work) is None
    measure(work, 1, "own")
    assert open_lengths(work)(np.arange(7)).tolist() == expected(conversations, BRIEF, 7)


def test_estimates_take_the_place_of_lengths(shards):
    measure(Measure(shards, PLAIN, TOKENIZER, LAYOUT), 1, "pairs")
    count = shards.num_samples
    captions = [shards.text(index, np.random.default_rng(0))[1][1].text for index in range(count)]
    assert shards.lengths(np.arange(count), 4).tolist() == [4 + len(caption) // 4 for caption in captions]


def test_the_hash_is_of_all_that_decides_a_length(conversations):
    ways = [
        (BRIEF, TOKENIZER, LAYOUT),
        (PLAIN, TOKENIZER, LAYOUT),
        (Preparation("brief", "upright", "pad", max_length=100), TOKENIZER, LAYOUT),
        (BRIEF, WordTokenizer(["a"]).build(), LAYOUT),
        (BRIEF, TOKENIZER, SampleFormat(LAYOUT.tokenizer, 9, 16, LAYOUT.image_mean)),
    ]
    hashes = [Measure(conversations, *way).hash for way in ways]
    assert len(set(hashes)) == len(hashes)
    same = Preparation("brief", "llava", "crop", max_length=2048)  # pictures alone
    tokenizer = WordTokenizer(LAYOUT.tokenizer.words).build()
    tokenizer(["a", "b b b"], truncation=True, max_length=2, padding=True)  # leaves its traces in the tokenizer
    assert Measure(conversations, same, tokenizer, LAYOUT).hash == hashes[0]


def test_long_documents_need_wider_numbers(write, pictures):
    records = [{"id": "long", "conversations": said("x", "y" * 70_000)}]
    source = LlavaConversations(write("long.json", records), pictures)
    source.setup()
    work = Measure(source, Preparation("brief", "upright", "pad", max_length=100_000), TOKENIZER, LAYOUT)
    measure(work, 1, "long")
    assert open_lengths(work)(np.array([0]))[0] > 70_000


def test_a_file_that_changed_is_measured_again(conversations, write, pictures):
    work = Measure(conversations, BRIEF, TOKENIZER, LAYOUT)
    measure(work, 1, "own")
    source = LlavaConversations(write("own.json", [{"id": "new", "conversations": said("what is it", "a b c")}]), pictures)
    source.setup()
    assert open_lengths(Measure(source, BRIEF, TOKENIZER, LAYOUT)) is None


def test_what_differs_from_epoch_to_epoch_is_not_measured():
    source = ShapesWorld(SHAPES)
    source.setup()
    assert open_lengths(Measure(source, BRIEF, TOKENIZER, LAYOUT)) is None


def test_training_deals_by_measured_lengths(shards, tmp_path):
    measure(Measure(shards, PLAIN, TOKENIZER, LAYOUT), 1, "pairs")
    data = opened({"pairs": TarShards(shards.shards, shards.index)}, tmp_path, template="plain", max_length=2048)
    source = data.sources["pairs"]
    numbers = np.arange(source.num_samples)
    assert source.lengths(numbers, LAYOUT.tokens_per_image).tolist() == expected(source, PLAIN, len(numbers))


def test_lengths_of_a_dataset_folder(tmp_path):
    from datasets import Dataset

    records = [{"conversations": said("how are you", "a " * number)} for number in (3, 1, 9)]
    Dataset.from_list(records).save_to_disk(tmp_path / "dataset")
    source = HuggingFaceDataset(str(tmp_path / "dataset"))
    source.setup()
    work = Measure(source, BRIEF, TOKENIZER, LAYOUT)
    measure(work, 1, "dataset")
    assert open_lengths(work)(np.arange(3)).tolist() == expected(source, BRIEF, 3)
