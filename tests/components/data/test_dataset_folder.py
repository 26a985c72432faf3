"""Hugging Face datasets: written by `datasets` and pyarrow themselves, read as conversations."""

import json
import os
import pickle
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.data.sources.dataset_folder import HuggingFaceDataset
from components.data.sources.llava import LlavaConversations
from components.errors import BadSample, RecipeError
from components.turns import Turn
from tests.components.data.saved_datasets import RANDOM, SPOKEN, TEXT, opened, picture, png, saved, says


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path_factory, monkeypatch):
    """Parquet files become Arrow in a folder of the test session, without bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "arrow"))
    datasets.disable_progress_bars()


def every(source: HuggingFaceDataset | LlavaConversations, count: int) -> list[Any]:
    return [source.sample(index, RANDOM) for index in range(count)]


LLAVA = [
    {"id": "a", "image": 0, "conversations": says("<image>\nWhat?", "A cup.", "Where?", "There.")},
    {"id": "b", "image": 1, "conversations": says("Is it <image> red?", "No.")},
    {"id": "c", "image": None, "conversations": says("Two plus two?", "Four.")},
]


@pytest.fixture
def from_json(tmp_path) -> LlavaConversations:
    """The records of LLAVA in a file with a folder."""
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"p{number}.png").write_bytes(png(number))
    named = [{**record, "image": f"p{record['image']}.png"} if record["image"] is not None else record for record in LLAVA]
    (tmp_path / "llava.json").write_text(json.dumps(named))
    source = LlavaConversations(str(tmp_path / "llava.json"), str(tmp_path / "images"))
    source.setup()
    return source


def as_bytes() -> list[dict[str, Any]]:
    return [{**record, "image": None if record["image"] is None else picture(record["image"])} for record in LLAVA]


def test_save_to_disk_equals_the_json_file(tmp_path, from_json):
    source = saved(tmp_path / "saved", as_bytes(), {"id": TEXT, "image": datasets.Image(), "conversations": SPOKEN})
    assert every(source, 3) == every(from_json, 3)
    assert [source.text(index, RANDOM) for index in range(3)] == [from_json.text(index, RANDOM) for index in range(3)]
    assert source.num_samples == 3


@pytest.mark.parametrize("image", [pa.struct([("bytes", pa.binary()), ("path", pa.string())]), pa.binary()])
def test_parquet_equals_the_json_file(tmp_path, from_json, image):
    """Written by pyarrow, without what `datasets` says of features."""
    records = as_bytes()
    if image == pa.binary():
        records = [{**record, "image": record["image"] and record["image"]["bytes"]} for record in records]
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", image),
            ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        ]
    )
    pq.write_table(pa.Table.from_pylist(records, schema), tmp_path / "rows.parquet")
    assert every(opened(tmp_path / "rows.parquet"), 3) == every(from_json, 3)


def test_paths_of_pictures_are_relative_to_a_folder(tmp_path, from_json):
    records = [{**record, "image": None if record["image"] is None else f"p{record['image']}.png"} for record in LLAVA]
    features = datasets.Features({"id": TEXT, "image": TEXT, "conversations": SPOKEN})
    datasets.Dataset.from_list(records, features=features).save_to_disk(str(tmp_path / "saved"))
    assert every(opened(tmp_path / "saved", images=str(tmp_path / "images")), 3) == every(from_json, 3)
    (tmp_path / "saved" / "p0.png").write_bytes(png(0))
    source = opened(tmp_path / "saved")
    assert source.sample(0, RANDOM) == from_json.sample(0, RANDOM)
    with pytest.raises(BadSample, match=r"saved, row 1, id b: .*p1\.png"):
        source.sample(1, RANDOM)


def test_several_pictures_stand_where_the_text_says_or_in_front(tmp_path):
    records = [
        {"images": [picture(0), picture(1)], "conversations": says("Compare.", "Equal.", "Sure?", "Yes.")},
        {"images": [picture(2), picture(3)], "conversations": says("Is <image> or <image> red?", "The first.")},
        {"images": [], "conversations": says("Hello?", "Hello.")},
    ]
    source = saved(tmp_path / "saved", records, {"images": datasets.List(datasets.Image()), "conversations": SPOKEN})
    first, second, third = every(source, 3)
    assert first.turns[0] == Turn("user", "<image>\n<image>\nCompare.")
    assert first.turns[1:] == [Turn("assistant", "Equal."), Turn("user", "Sure?"), Turn("assistant", "Yes.")]
    assert second.turns[0] == Turn("user", "Is <image> or <image> red?")
    assert third.turns[0] == Turn("user", "Hello?")
    assert [sample.images for sample in (first, second, third)] == [[png(0), png(1)], [png(2), png(3)], []]
    assert [sample.id for sample in (first, second, third)] == ["0", "1", "2"]
    assert [source.text(index, RANDOM)[2] for index in range(3)] == [2, 2, 0]


def test_records_as_in_the_cauldron(tmp_path):
    records = [
        {
            "images": [picture(0)],
            "texts": [
                {"user": "How many?", "assistant": "Two.", "source": "made"},
                {"user": "Which?", "assistant": "Red ones.", "source": "made"},
            ],
        }
    ]
    features = {
        "images": datasets.List(datasets.Image()),
        "texts": datasets.List({"user": TEXT, "assistant": TEXT, "source": TEXT}),
    }
    source = saved(tmp_path / "saved", records, features)
    sample = source.sample(0, RANDOM)
    assert [(turn.role, turn.text) for turn in sample.turns] == [
        ("user", "<image>\nHow many?"),
        ("assistant", "Two."),
        ("user", "Which?"),
        ("assistant", "Red ones."),
    ]
    assert sample.images == [png(0)]
    assert "exchanges as in the_cauldron" in source.describe()


def test_lists_that_older_datasets_stored_by_column(tmp_path):
    texts = {"user": ["How many?", "Which?"], "assistant": ["Two.", "Red ones."]}
    pq.write_table(pa.Table.from_pylist([{"texts": texts}]), tmp_path / "old.parquet")
    source = opened(tmp_path / "old.parquet")
    assert [turn.text for turn in source.sample(0, RANDOM).turns] == ["How many?", "Two.", "Which?", "Red ones."]
    assert source.estimate(np.array([0]), 100).tolist() == [len("How many?Two.Which?Red ones.") // 4]


def test_chats_of_parts_and_of_texts(tmp_path):
    part = {"type": TEXT, "text": TEXT}
    features = {
        "messages": datasets.List({"role": TEXT, "content": datasets.List(part)}),
        "images": datasets.List(datasets.Image()),
    }
    show, ask, answer = {"type": "image", "text": None}, {"type": "text", "text": "What?"}, {"type": "text", "text": "A cup."}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [show, ask, show]},
        {"role": "assistant", "content": [answer]},
    ]
    source = saved(tmp_path / "parts", [{"messages": messages, "images": [picture(0), picture(1)]}], features)
    assert source.sample(0, RANDOM).turns == [Turn("user", "Be brief.\n<image>\nWhat?\n<image>"), Turn("assistant", "A cup.")]
    plain = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cup."}]
    features = {"messages": datasets.List({"role": TEXT, "content": TEXT}), "images": datasets.List(datasets.Image())}
    source = saved(tmp_path / "texts", [{"messages": plain, "images": [picture(0)]}], features)
    assert source.sample(0, RANDOM).turns == [Turn("user", "<image>\nWhat?"), Turn("assistant", "A cup.")]


@pytest.mark.parametrize("column", ["caption", "text"])
def test_pictures_with_captions(tmp_path, column):
    source = saved(tmp_path / "saved", [{"image": picture(0), column: "A red cup."}], {"image": datasets.Image(), column: TEXT})
    sample = source.sample(0, RANDOM)
    assert sample.turns == [Turn("user", "<image>"), Turn("assistant", "A red cup.")]
    assert sample.images == [png(0)]


def test_pictures_stay_as_they_were_encoded(tmp_path):
    """Even bytes that are no picture: whether they can be decoded is decided elsewhere."""
    records = [{"image": {"bytes": b"no picture", "path": None}, "caption": "Noise."}]
    source = saved(tmp_path / "saved", records, {"image": datasets.Image(), "caption": TEXT})
    assert source.sample(0, RANDOM).images == [b"no picture"]


def test_text_reads_no_picture(tmp_path, monkeypatch):
    source = saved(tmp_path / "saved", as_bytes(), {"id": TEXT, "image": datasets.Image(), "conversations": SPOKEN})
    values, read = source._value, []
    monkeypatch.setattr(source, "_value", lambda index, column: read.append(column) or values(index, column))
    source.text(0, RANDOM)
    assert read
    assert "image" not in read
    source.sample(0, RANDOM)
    assert "image" in read


def test_lengths_follow_texts_and_pictures(tmp_path):
    records = [
        {"images": [picture(0), picture(1)], "conversations": says("x" * 400, "y" * 80)},
        {"images": None, "conversations": says("x" * 40, "y" * 40)},
        {"images": [picture(2)], "conversations": says("ü" * 20, "y")},
    ]
    source = saved(tmp_path / "saved", records, {"images": datasets.List(datasets.Image()), "conversations": SPOKEN})
    marks = len("humangpt")
    assert source.lengths(np.array([2, 0, 1]), 576).tolist() == [
        576 + (41 + marks) // 4,
        2 * 576 + (480 + marks) // 4,
        (80 + marks) // 4,
    ]


def test_pictures_are_held_out_with_all_their_records(tmp_path):
    records = [{"image": {"bytes": png(number % 9), "path": None}, "caption": f"{number}"} for number in range(90)]
    datasets.Dataset.from_list(records, features=datasets.Features({"image": datasets.Image(), "caption": TEXT})).save_to_disk(
        str(tmp_path / "saved")
    )
    source = opened(tmp_path / "saved", validation_fraction=0.4)
    held_out = {source.sample(int(index), RANDOM).images[0] for index in source.validation_indices}
    trained = {source.sample(int(index), RANDOM).images[0] for index in source.train_indices(np.arange(source.num_samples))}
    assert len(held_out) + len(trained) == 9
    assert held_out
    assert not held_out & trained


def test_splits_are_named(tmp_path):
    parts = {name: datasets.Dataset.from_list([{"image": picture(0), "text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    for name, part in parts.items():
        (tmp_path / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(str(tmp_path / "parquet" / "data" / f"{name}-00000-of-00001.parquet"))
    for folder in ("saved", "parquet"):
        assert opened(tmp_path / folder, split="test").sample(0, RANDOM).turns[1].text == "test"
        assert "split test, row 0" in opened(tmp_path / folder, split="test").where(0)
        for split, said in ((None, "null"), ("val", "val")):
            with pytest.raises(RecipeError, match=f"has the splits train, test; split is {said}"):
                opened(tmp_path / folder, split=split)
    parts["train"].save_to_disk(str(tmp_path / "alone"))
    with pytest.raises(RecipeError, match="without splits, but split is train"):
        opened(tmp_path / "alone", split="train")


def test_fingerprint_changes_with_texts_and_not_with_the_place(tmp_path):
    records = [{"image": picture(number), "caption": "abc"} for number in range(3)]
    features = {"image": datasets.Image(), "caption": TEXT}
    fingerprints = set()
    for folder, change in (("a", "abc"), ("b", "abc"), ("c", "abcd"), ("d", "xyz")):
        (tmp_path / folder).mkdir()
        changed = [{**record, "caption": change} if number == 2 else record for number, record in enumerate(records)]
        fingerprints.add(saved(tmp_path / folder / "saved", changed, features).fingerprint())
    assert len(fingerprints) == 3


def test_samples_are_read_after_a_fork_and_after_pickling(tmp_path):
    source = saved(tmp_path / "saved", as_bytes(), {"id": TEXT, "image": datasets.Image(), "conversations": SPOKEN})
    expected = every(source, 3)
    assert every(pickle.loads(pickle.dumps(source)), 3) == expected
    process = os.fork()
    if not process:
        os._exit(0 if every(source, 3) == expected else 1)
    assert os.waitpid(process, 0)[1] == 0
