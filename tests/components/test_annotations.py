"""Annotation files: the same records as json.load, by byte range, with errors that name the place."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from components import annotations
from components.annotations import Annotations
from components.errors import RecipeError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "vlm_recipes"


def hostile_records() -> list[dict[str, Any]]:
    """Records whose strings hold all that a bracket counter could stumble over."""
    texts = ["{[", "]}", '"', "\\", '\\"', '\\\\"]', "日本語 ü 🐶", "line\nline\r\n", "", "<image>\nWhat?", "\\" * 7, "\u2028"]
    return [
        {
            "id": f"sample-{i}",
            "image": texts[i % len(texts)],
            "conversations": [{"from": "human", "value": text * (i % 4)} for text in texts],
            texts[(i + 5) % len(texts)]: [[i, -1.5e3], {}, [], None, True],
        }
        for i in range(12)
    ]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(records: list[dict[str, Any]], **options: Any) -> str:
    return "".join(json.dumps(record, **options) + "\n" for record in records)


@pytest.mark.parametrize("block", [3, 61, 2**24])
@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("layout", ["compact", "one line", "indented", "tabs", "jsonl", "windows", "byte order mark"])
def test_records_equal_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, ensure_ascii: bool, block: int) -> None:
    monkeypatch.setattr(annotations, "_BLOCK", block)
    records = hostile_records()
    options: dict[str, dict[str, Any]] = {
        "compact": {"separators": (",", ":")},
        "indented": {"indent": 2},
        "tabs": {"indent": "\t"},
    }
    text = json.dumps(records, ensure_ascii=ensure_ascii, **options.get(layout, {}))
    if layout in ("jsonl", "windows"):
        text = lines(records, ensure_ascii=ensure_ascii)
    text = {"windows": "\r\n" + text.replace("\n", "\r\n\r\n"), "byte order mark": f"\ufeff\n {text} \n"}.get(layout, text)
    loaded = Annotations(written(tmp_path / "file.json", text))
    assert len(loaded) == 12
    assert list(loaded) == records
    assert loaded[-1] == records[-1]


def test_where_names_file_and_line(tmp_path: Path) -> None:
    records = hostile_records()
    by_line = Annotations(written(tmp_path / "a.jsonl", lines(records[:9]) + "\n  \n" + lines(records[9:])))
    assert by_line.where(0) == f"{tmp_path}/a.jsonl line 1"
    assert by_line.where(8) == f"{tmp_path}/a.jsonl line 9"
    assert by_line.where(9) == f"{tmp_path}/a.jsonl line 12"
    array = Annotations(written(tmp_path / "a.json", "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"))
    assert array.where(10) == f"{tmp_path}/a.json line 12 (record 11)"


@pytest.mark.parametrize("layout", ["json", "jsonl"])
def test_an_index_past_the_end_is_an_index_error(tmp_path: Path, layout: str) -> None:
    loaded = Annotations(written(tmp_path / "a", '{"id": 1}\n' if layout == "jsonl" else '[{"id": 1}]'))
    with pytest.raises(IndexError):
        loaded[1]


def test_ranges_are_cached_until_the_file_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.jsonl", '{"id": 1}\n{"id": 2}\n')
    Annotations(path)
    assert len(list(cache.iterdir())) == 1

    passes = []
    find = annotations._line_ranges
    monkeypatch.setattr(annotations, "_line_ranges", lambda data: passes.append(1) or find(data))
    assert list(Annotations(path)) == [{"id": 1}, {"id": 2}]
    assert not passes
    written(path, '{"i": 10}\n{"i": 20}\n')  # as long as before, but newer
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert list(Annotations(path)) == [{"i": 10}, {"i": 20}]
    assert passes


def test_a_damaged_cache_is_replaced(tmp_path: Path, cache: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines(hostile_records()))
    Annotations(path)
    (cached,) = cache.iterdir()
    for damage in (b"", cached.read_bytes()[:100]):
        cached.write_bytes(damage)
        assert len(Annotations(path)) == 12
        assert [file.name for file in cache.iterdir()] == [cached.name]


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    loaded = Annotations(written(tmp_path / "a.jsonl", lines(hostile_records())))
    assert list(pickle.loads(pickle.dumps(loaded))) == hostile_records()


def test_no_home_folder_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert len(Annotations(written(tmp_path / "a.jsonl", '{"id": 1}'))) == 1


def test_pickling_sends_a_path_not_the_data(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"id": 1}\n' * 10_000)
    sent = pickle.dumps(Annotations(path))
    assert len(sent) < 1000
    assert len(pickle.loads(sent)) == 10_000


def test_forked_loader_workers_read_the_same_records(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    path = written(tmp_path / "a.json", json.dumps(hostile_records()))
    loader = DataLoader(Annotations(path), batch_size=None, num_workers=2)
    assert list(loader) == hostile_records()


def message_of(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        list(Annotations(path))
    return str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    assert "There is no annotation file" in message_of(tmp_path / "none.json")
    assert "There is no annotation file" in message_of(tmp_path)
    assert "is empty (0 bytes)" in message_of(written(tmp_path / "a.json", ""))
    for content in ("\n \n", "[]", " [ ]\n"):
        assert "holds no records" in message_of(written(tmp_path / "a.json", content))


def test_a_truncated_last_line_shows_at_once(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"id": 1}\n{"id": 2, "conversations": [{"from": "hum')
    with pytest.raises(RecipeError) as caught:
        Annotations(path)
    message = str(caught.value)
    assert f"{path} line 2 is not valid JSON" in message
    assert '{"id": 2, "conversations": [{"from": "hum' in message
    assert "fetch it again" in message


def test_a_broken_line_in_the_middle_is_named_when_read(tmp_path: Path) -> None:
    loaded = Annotations(written(tmp_path / "a.jsonl", '{"id": 1}\n{"id": 2\n{"id": 3}\n'))
    assert loaded[2] == {"id": 3}
    with pytest.raises(RecipeError, match="a.jsonl line 2 is not valid JSON"):
        loaded[1]


def test_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"id": "Zoë"}\n'.encode("latin-1"))
    assert "a.jsonl line 1 is not valid JSON" in message_of(path)


@pytest.mark.parametrize("cut", ["between", "in a record", "in a string", "in an escape"])
def test_a_truncated_array_names_its_last_whole_record(tmp_path: Path, cut: str) -> None:
    text = json.dumps([{"id": f"s{i}", "value": '"quoted"'} for i in range(9)], indent=1)
    end = {"between": text.index('"s5"') - 10, "in a record": text.index('"s5"'), "in a string": text.index('"s5"') + 2}.get(cut)
    end = end or text.index("\\", text.index('"s5"')) + 1
    message = message_of(written(tmp_path / "a.json", text[:end]))
    assert "number 5 (id s4), which ends in line 21" in message
    assert f"truncated at {end} bytes" in message


def test_an_array_cut_in_its_first_record_says_so(tmp_path: Path) -> None:
    assert "no record is whole" in message_of(written(tmp_path / "a.json", '[{"id": 1'))


@pytest.mark.parametrize(
    "content",
    ['[{"a": 1}, 2, {"a": 3}]', '[1, {"a": 2}]', '[{"a": 1}, "x"]', '[{"a": 1} {"a": 2}]', '[{"a": 1},]', '[{"a": 1}] [{"a": 2}]'],
)
def test_an_array_of_other_things_is_refused(tmp_path: Path, content: str) -> None:
    assert "a.json line 1: the array should go on with" in message_of(written(tmp_path / "a.json", content))


@pytest.mark.parametrize("content", ['{"a": 1}\n[1]\n', '{"a": 1}\n"x"\n', '[{"a": 1}, [2]]'])
def test_a_record_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    assert "is not a JSON object" in message_of(written(tmp_path / "a.json", content))
