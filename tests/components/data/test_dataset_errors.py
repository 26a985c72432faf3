"""Hugging Face datasets that cannot be used: said with the file, the row, and what is wanted."""

import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.errors import BadSample, RecipeError
from tests.components.data.saved_datasets import RANDOM, TEXT, opened, picture, png, saved, says


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path_factory, monkeypatch):
    """Parquet files become Arrow in a folder of the test session, without bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "arrow"))
    datasets.disable_progress_bars()


def test_unknown_columns_are_named_with_those_wanted(tmp_path):
    with pytest.raises(RecipeError, match=re.escape("has the columns question, picture. Wanted: `conversations`")):
        saved(tmp_path / "saved", [{"question": "What?", "picture": picture(0)}], {"question": TEXT, "picture": datasets.Image()})


BROKEN = {
    "no role": ({"messages": [{"content": "What?"}]}, "Message 1 must have a `role`"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "Message 1: `content` is missing"),
    "no answer": ({"texts": [{"user": "What?", "assistant": None}]}, "Exchange 1 must have texts"),
    "speaker": ({"conversations": [{"from": "robot", "value": "What?"}]}, "Turn 1 must have `from`"),
    "empty": ({"conversations": None}, "`conversations` is missing or empty"),
    "caption": ({"image": "p.png", "caption": " "}, "The caption is missing or empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_named(tmp_path, name):
    record, message = BROKEN[name]
    column = next(key for key in record if key != "image")
    whole = {
        "messages": [{"role": "user", "content": "What?"}],
        "texts": [{"user": "What?", "assistant": "This."}],
        "conversations": says("What?", "This."),
        "caption": "A cup.",
    }
    records = [{**record, column: whole[column]}, record]
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    source = opened(tmp_path / "saved")
    with pytest.raises(BadSample, match=re.escape(f"{tmp_path / 'saved'}, row 1, id 1: {message}")):
        source.text(1, RANDOM)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for path in (tmp_path, tmp_path / "rows.jsonl", tmp_path / "absent"):
        with pytest.raises(RecipeError, match="neither a folder of save_to_disk, nor a Parquet file"):
            opened(path)
    with pytest.raises(RecipeError, match=r"somebody/something cannot be read: .*hf download"):
        opened("somebody/something")


def test_a_dataset_of_the_hub_is_asked_for_by_its_name(monkeypatch):
    found = datasets.DatasetDict(train=datasets.Dataset.from_list([{"image": picture(0), "caption": "A cup."}]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"somebody/something": found}[name])
    source = opened("somebody/something")
    assert source.sample(0, RANDOM).images == [png(0)]


@pytest.mark.parametrize("path", ["/etc/passwd", "../p0.png", "absent.png"])
def test_paths_that_leave_the_folder_are_bad_samples(tmp_path, path):
    (tmp_path / "p0.png").write_bytes(png(0))
    source = saved(tmp_path / "saved", [{"image": path, "caption": "A cup."}], {"image": TEXT, "caption": TEXT})
    with pytest.raises(BadSample, match="row 0, id 0: picture"):
        source.sample(0, RANDOM)


def test_an_empty_dataset_is_refused(tmp_path):
    some = datasets.Dataset.from_list([{"image": picture(0), "caption": "A cup."}])
    some.filter(lambda record: False).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(RecipeError, match="saved holds no record"):
        opened(tmp_path / "saved")


def test_a_damaged_file_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [png(0)], "caption": ["A cup."]}), tmp_path / "rows.parquet")
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(whole[:-30])
    with pytest.raises(RecipeError, match=r"rows\.parquet cannot be read: .*Write or fetch it again"):
        opened(tmp_path / "rows.parquet")
