"""`python main.py index`: what it prints and writes, that it goes on where it was, and mistakes told with their remedies."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from small_recipe import fit, write_recipe

import main
from tests.components.data.some_shards import WORDS, pairs, write_shard, write_shards
from tests.components.plan.test_render import Reader
from tests.components.shards.serving import serving


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards, of which one lacks a caption and has a hole of zeros."""
    place = tmp_path_factory.mktemp("shards")
    write_shards(place)
    content = bytearray((place / "00001.tar").read_bytes())
    content[20_480:22_528] = bytes(2048)
    (place / "00001.tar").write_bytes(content)
    return place


@pytest.fixture(autouse=True)
def folder(shards, tmp_path, monkeypatch):
    """A folder with shards of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(shards, "shards")
    return tmp_path


def index(*options):
    return main.main(["index", *options, "--processes", "1"])


def run_as_told(message):
    """Paste the command of a message."""
    command = re.search(r"Run python main\.py index (.*?)(?: first|: |, or |\.\n)", message).group(1)
    return index(*shlex.split(command))


def counted(text, what):
    return int(re.search(rf"^ *{what} +([\d,]+)$", text, re.MULTILINE).group(1).replace(",", ""))


def recipe(folder, **options):
    init = {"shards": "shards/*.tar", "index": "shards/index", "overrides": {"template": "plain"}, **options}
    source = {"class_path": "components.data.TarShards", "init_args": init}
    words = {"decoder": {"init_args": {"tokenizer": {"words": WORDS}}}}
    file = write_recipe(folder / "small.yaml", model=words)
    tree = yaml.safe_load(file.read_text())
    tree["data"]["sources"] = {"pairs": source}
    file.write_text(yaml.safe_dump(tree))
    return file


def test_shards_alone(capsys):
    assert index("--shards", "shards/{00000..00002}.tar") == 0
    text = capsys.readouterr().out
    rows = [np.load(f"shards/index/{shard:05d}.rows.npy") for shard in range(3)]
    assert counted(text, "samples") == sum(map(len, rows)) < 105
    assert counted(text, "img2dataset: count") == 108 and counted(text, "img2dataset: successes") == 105
    assert f"shards/00001.tar: {len(rows[1])} of 35" in text
    quarantine = [json.loads(line) for line in Path("shards/index/quarantine.jsonl").read_text().splitlines()]
    assert {entry["shard"] for entry in quarantine} == {"00001"} and all(entry["reason"] for entry in quarantine)
    assert all(counted(text, f"put aside: {entry['kind']}") for entry in quarantine)
    page = Path("shards/index/index.html").read_text()
    reader = Reader(page)
    assert reader.outside == [] and "00001" in reader.text and quarantine[0]["reason"] in reader.text
    assert page.count("<svg") == 4


def test_shards_of_names_that_are_code_stay_text(capsys):
    made = pairs(7, 3)
    made[0].key = "<script>alert(1)"
    made[1].picture = b"<img src=x onerror=alert(1)>"
    made[1].key = "<img src=x onerror=alert(1)>"
    write_shard(Path("odd"), "<b>", made)
    assert index("--shards", "odd/*.tar", "--report", "page.html") == 0
    assert Reader(Path("page.html").read_text()).outside == []


def test_a_recipe_from_shards_to_training(folder, capsys):
    file = recipe(folder, filters={"min_characters": 12, "scores": {"similarity": [0.22, None]}}, validation_fraction=0.1)
    assert fit(file) == 2
    assert run_as_told(capsys.readouterr().err) == 0  # the index is there, but not what filters and validation_fraction leave
    assert fit(file) == 2
    assert "Run python main.py index --config RECIPE" in capsys.readouterr().err
    assert index("--config", str(file), "--show", "3") == 0
    text = capsys.readouterr().out
    train, held_out = counted(text, "used: train"), counted(text, "used: validation")
    dropped = sum(counted(text, f"dropped: {reason}") for reason in ("caption too short", "similarity below 0.22"))
    assert counted(text, "samples") == train + held_out + dropped and min(train, held_out, dropped) > 0
    assert "length of a sample (tokens)" in text
    shown = Reader(Path("runs/small/samples.html").read_text())
    captions = {pair.caption for shard in range(3) for pair in pairs(shard, 30 + 5 * shard)}
    said = [caption.strip() for caption in shown.said("supervised").splitlines()]
    assert len(said) == 3 and set(said) <= captions and all(len(caption) >= 12 for caption in said)
    assert fit(file) == 0
    assert f"{train:,} samples of shards/*.tar" in capsys.readouterr().out


def test_what_is_done_is_not_done_again(folder, capsys):
    file = recipe(folder, filters={"min_characters": 12})
    assert index("--config", str(file)) == 0
    first = capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in Path("shards/index").glob("0*")}
    assert len(made) == 3 * 6
    assert index("--config", str(file)) == 0
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in Path("shards/index").glob("0*")} == made


MISTAKES = {
    "no such recipe": (["--config", "nowhere.yaml", "--index", "x"], "--config: nowhere.yaml cannot be read"),
    "nothing": ([], "Neither shards nor a recipe"),
    "no such shard": (["--shards", "nowhere/*.tar"], "nowhere"),
    "both": (["--config", "small.yaml", "--index", "x"], "--index goes with --shards"),
    "samples without a recipe": (["--shards", "shards/*.tar", "--show", "2"], "--show goes with --config"),
    "a slip": (["--shards", "shards/*.tar", "--porcesses", "2"], "--porcesses"),
    "far shards": (["--shards", "s3://bucket/{0..3}.tar"], "--index FOLDER"),
    "a page that cannot be": (
        ["--shards", "shards/*.tar", "--report", "shards/00000.tar/page.html"],
        "--report: shards/00000.tar/page.html cannot be written",
    ),
    "no evaluation": (["--shards", "shards/*.tar", "--distance", "3"], "--distance says nothing without --against"),
    "no samples": (["--config", "small.yaml", "--page", "x.html"], "--page says nothing without --show"),
    "no number": (["--shards", "shards/*.tar", "--show", "0"], "at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(mistake, capsys):
    options, message = MISTAKES[mistake]
    write_recipe(Path("small.yaml"))
    assert index(*options) == 2
    assert message in capsys.readouterr().err


def test_a_mistake_names_its_source(folder, capsys):
    file = recipe(folder, filters={"scores": {"nsfw": [None, 0.5]}})
    assert index("--config", str(file)) == 2
    assert re.search(r"data\.sources\.pairs: .*nsfw", capsys.readouterr().err)


def test_pictures_that_evaluations_ask_about(folder, capsys):
    made = [pairs(shard, 30 + 5 * shard) for shard in range(3)]
    Path("exam").mkdir()
    for name, pair in (("a", made[0][3]), ("b", made[2][7])):
        Path(f"exam/{name}.jpg").write_bytes(pair.picture)
    file = recipe(folder, filters={"exclude": "shards/index/exclude.jsonl"})
    assert index("--config", str(file), "--against", "exam", "--distance", "0") == 0
    text = capsys.readouterr().out
    excluded = {json.loads(line)["key"] for line in Path("shards/index/exclude.jsonl").read_text().splitlines()}
    assert {made[0][3].key, made[2][7].key} <= excluded
    assert counted(text, "dropped: excluded") == len(excluded)
    assert "2 of 2" in text and Path("shards/index/overlaps.html").is_file()


@pytest.mark.slow
def test_shards_behind_urls_are_as_those_on_this_machine(folder, capsys):
    options = {"filters": {"min_characters": 12, "scores": {"similarity": [0.22, None]}}, "validation_fraction": 0.1}
    assert index("--config", str(recipe(folder, **options))) == 0
    here = capsys.readouterr().out
    with serving(folder / "shards") as server:
        far = server.url + "/{00000..00002}.tar"
        assert index("--config", str(recipe(folder, shards=far, index="far", **options)), "--show", "2") == 0
        gets = [path for method, path, _ in server.requests if method == "GET" and path.endswith(".tar")]
    there = capsys.readouterr().out
    assert there.replace(f"{server.url}/", "shards/").splitlines()[:-2] == here.splitlines()[:-1]
    assert len(gets) < 3 * 4  # neither headers nor captions are asked for one by one


def test_keys_that_stand_in_two_shards_are_told(capsys):
    write_shard(Path("shards"), "00003", pairs(0, 12), parquet=False)
    assert index("--shards", "shards/*.tar") == 0
    assert "12 samples have the key of one in another shard" in capsys.readouterr().out


def test_keys_that_are_too_many_to_be_compared_are_told(capsys, monkeypatch):
    monkeypatch.setattr("components.shards.audit.MAX_KEYS", 100)
    assert index("--shards", "shards/*.tar") == 0
    assert "whether keys stand in two shards was not looked for" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_no_text_or_move_the_cursor_are_shown_as_text(encoding, monkeypatch):
    made = pairs(7, 4)
    for pair, key in zip(made, ("caf\udce9", "\x1b[2Jgone", "two\nlines", "\N{SNOWMAN}"), strict=True):
        pair.key, pair.picture = key, b"no picture"
    write_shard(Path("odd"), "r\udce9sum\udce9", made, parquet=False)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    assert index("--shards", "odd/*.tar", "--report", "page.html") == 0
    terminal.seek(0)
    text = terminal.read()
    assert all(shown in text for shown in ("caf\\udce9 bad", "\\x1b[2Jgone", "two\\nlines", "r\\udce9sum"))
    assert ("\N{SNOWMAN}" if encoding == "utf-8" else "\\u2603") in text
    assert all(character.isprintable() for character in text.replace("\n", ""))
    assert "caf\\udce9" in Path("page.html").read_text()


def test_numbers_that_img2dataset_did_not_write_whole_are_a_note(capsys):
    Path("shards/00001_stats.json").write_text('{"count": ')
    Path("shards/00002_stats.json").unlink()
    Path("shards/00002_stats.json").mkdir()
    assert index("--shards", "shards/*.tar") == 0
    text = capsys.readouterr().out
    assert "img2dataset's numbers of 2 shards are left out: the _stats.json beside shards/00001.tar is not JSON" in text
    assert counted(text, "img2dataset: count") == 31


def test_numbers_of_many_shards_are_those_of_each(capsys, monkeypatch):
    """A few shards are added up at a time."""
    written = []
    for together in (1, 2, 32):
        monkeypatch.setattr("components.data.index_report._TOGETHER", together)
        assert index("--shards", "shards/*.tar") == 0
        written.append(Path("shards/index/index.html").read_text())
        assert counted(capsys.readouterr().out, "img2dataset: count") == 108
    assert len(set(written)) == 1 and f"00001.tar</td><td>{len(np.load('shards/index/00001.rows.npy'))}</td><td>35" in written[0]


def test_all_problems_are_written_and_a_few_are_shown(capsys, monkeypatch):
    monkeypatch.setattr("components.indexing.LISTED", 20)
    made = pairs(7, 30)
    for pair in made:
        pair.picture = b"no picture"
    write_shard(Path("odd"), "0", made)
    write_shard(Path("odd"), "1", pairs(8, 5)[:2])
    Path("odd/2.tar").mkdir()
    for _ in range(2):  # the second time, what was found is read again
        assert index("--shards", "odd/*.tar", "--report", "page.html") == 0
        assert "the first of what was put aside, of 31:" in capsys.readouterr().out
        written = [json.loads(line) for line in Path("odd/index/quarantine.jsonl").read_text().splitlines()]
        assert [entry["key"] for entry in written] == [*(pair.key for pair in made), ""]
        assert written[-1]["kind"] == "unreadable"
        page = Path("page.html").read_text()
        assert "The first 20 of 31." in page and page.count("bad picture") == 21  # with the line of the table


def test_an_index_of_all_shards_is_not_replaced_by_one_of_some(capsys):
    assert index("--shards", "shards/*.tar") == 0
    before = {path: path.read_bytes() for path in Path("shards/index").iterdir()}
    assert index("--shards", "shards/00000.tar") == 2
    message = capsys.readouterr().err
    assert "2 (00001 ...) are not among" in message and "--index FOLDER" in message
    assert {path: path.read_bytes() for path in Path("shards/index").iterdir()} == before
    assert index("--shards", "shards/00000.tar", "--index", "one") == 0


def test_two_sources_with_one_folder_for_their_indexes_are_told(folder, capsys):
    file = recipe(folder)
    tree = yaml.safe_load(file.read_text())
    one = tree["data"]["sources"]["pairs"]
    tree["data"]["sources"]["same"] = one
    tree["data"]["sources"]["other"] = {
        **one,
        "init_args": {**one["init_args"], "index": "./shards/index", "shards": "shards/00000.tar"},
    }
    file.write_text(yaml.safe_dump(tree))
    assert index("--config", str(file)) == 2
    assert "data.sources.pairs and data.sources.other have one `index`, shards/index, but other shards" in capsys.readouterr().err
    assert not Path("shards/index").exists()
    del tree["data"]["sources"]["other"]
    file.write_text(yaml.safe_dump(tree))
    assert index("--config", str(file)) == 0


def test_names_of_bad_samples_are_shown_as_text(folder, capsys):
    made = pairs(7, 4)
    Image.effect_noise((64, 64), 100).save(buffer := io.BytesIO(), "JPEG")
    made[2].picture = buffer.getvalue()[:-1000]  # its size can be read
    write_shard(Path("odd"), "\x1b[2Jgone", made)
    assert index("--config", str(recipe(folder, shards="odd/*.tar", index="odd/index")), "--show", "4") == 0
    text = capsys.readouterr().out
    assert "odd/\\x1b[2Jgone.tar, sample 2" in text and "\x1b" not in text
