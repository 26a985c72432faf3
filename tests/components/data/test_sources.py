"""Sources: every shape of annotation becomes the right conversation, splits are by picture, and errors name the place."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.data import LlavaConversations, QuestionAnswers, ShapesWorld, Source
from components.errors import BadSample, RecipeError
from components.shapes_world import HELD_OUT_PAIRS, Setting
from components.turns import Turn


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def train_indices(source: Source) -> np.ndarray:
    return source.train_indices(np.arange(source.num_samples))


def llava(id: Any, image: Any, *texts: str) -> dict[str, Any]:
    conversation = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": id, "conversations": conversation} | ({} if image is None else {"image": image})


CONVERSATIONS = [
    llava("one", "p1.png", "<image>\nWhat?", "A plane."),
    llava("turns", "p2.png", "What is it?\n<image>", "A cat.", "Where?", "On the mat."),
    llava("text", None, "2 + 2?", "4"),
    llava("two", ["p3.png", "p4.png"], "<image> or <image>?", "The first."),
    llava(17, "p1.png", "<image>\nColor?", "Red."),
]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_llava_conversations(name: str, write, pictures: str) -> None:
    source = LlavaConversations(write(name, CONVERSATIONS), pictures)
    source.setup()
    samples = [source.sample(int(index), random()) for index in train_indices(source)]

    assert [sample.id for sample in samples] == ["one", "turns", "text", "two", "17"]
    assert samples[1].turns == [
        Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat."), Turn("user", "Where?"), Turn("assistant", "On the mat."),
    ]  # fmt: skip
    assert samples[2].turns == [Turn("user", "2 + 2?"), Turn("assistant", "4")]
    assert samples[3].turns[0] == Turn("user", "<image> or <image>?")
    read = [[(Path(pictures) / f"p{number}.png").read_bytes() for number in numbers] for numbers in ((1,), (2,), (), (3, 4), (1,))]
    assert [sample.images for sample in samples] == read


def test_longer_records_are_longer_samples(write, pictures: str) -> None:
    records = [llava(0, "p1.png", "<image>\nWhat?", "word " * count) for count in (1, 100, 10)]
    source = LlavaConversations(write("train.json", records), pictures)
    source.setup()
    short, long, middle = source.lengths(np.arange(3), tokens_per_image=576).tolist()
    assert 576 < short < middle < long < 576 + 300


QUESTIONS = [
    {"question_id": 10 + i, "image": f"p{picture}.png", "text": f"Question {i}?", "answer": f"answer {i}"}
    for i, picture in enumerate([0, 1, 0, 2, 1, 0])
]


def test_questions_about_one_picture_share_a_sample(write, pictures: str) -> None:
    source = QuestionAnswers(write("train.jsonl", QUESTIONS), pictures, questions_per_sample=5)
    source.setup()
    assert source.num_samples == 3
    asked = {}
    for index in range(3):
        sample = source.sample(index, random())
        assert sample.turns[0].text.startswith("<image>\nQuestion ")
        assert sum(turn.text.count("<image>") for turn in sample.turns) == len(sample.images) == 1
        pairs = list(zip(sample.turns[::2], sample.turns[1::2], strict=True))
        assert all(q.text.removeprefix("<image>\n") == f"Question {a.text.removeprefix('answer ')}?" for q, a in pairs)
        asked[sample.images[0]] = {int(answer.text.removeprefix("answer ")) for _, answer in pairs}
    assert asked == {(Path(pictures) / f"p{p}.png").read_bytes(): rows for p, rows in ((0, {0, 2, 5}), (1, {1, 4}), (2, {3}))}


def test_questions_per_sample_draws_others_every_time(write, pictures: str) -> None:
    source = QuestionAnswers(write("train.jsonl", QUESTIONS), pictures, questions_per_sample=2)
    source.setup()
    three = next(index for index in range(3) if len(source.rows(index)) == 3)
    drawn = [tuple(turn.text for turn in source.sample(three, random(seed)).turns[1::2]) for seed in range(50)]
    assert {len(answers) for answers in drawn} == {2}
    assert set(drawn) == {(f"answer {a}", f"answer {b}") for a in (0, 2, 5) for b in (0, 2, 5) if a != b}
    assert drawn[7] == tuple(turn.text for turn in source.sample(three, random(7)).turns[1::2])


def test_questions_without_an_answer_are_refused_with_their_line(write, pictures: str) -> None:
    broken = [*QUESTIONS[:2], {"image": "p1.png", "text": "Why?"}]
    source = QuestionAnswers(write("train.jsonl", broken), pictures)
    with pytest.raises(RecipeError, match=r"train\.jsonl line 3: answer missing or not a text"):
        source.setup()


def many(images: int, samples: int) -> list[dict[str, Any]]:
    return [llava(i, f"p{i % images}.png", "<image>\nWhat?", "That.") for i in range(samples)]


def pictures_of(source: LlavaConversations, indices: np.ndarray) -> set[str]:
    return {source.records[int(index)]["image"] for index in indices}


def test_validation_holds_out_whole_pictures(write, pictures: str) -> None:
    records = many(images=400, samples=1_000)
    source = LlavaConversations(write("train.json", records), pictures, validation_fraction=0.2)
    source.setup()
    assert sorted([*train_indices(source), *source.validation_indices]) == list(range(1_000))
    held_out = pictures_of(source, source.validation_indices)
    assert not held_out & pictures_of(source, train_indices(source))
    assert 0.14 < len(held_out) / 400 < 0.26

    again = LlavaConversations(write("train.jsonl", records[::-1]), pictures, validation_fraction=0.2)
    again.setup()
    assert pictures_of(again, again.validation_indices) == held_out  # whatever the file's format and order

    wider = LlavaConversations(again.annotations, pictures, validation_fraction=0.4)
    wider.setup()
    assert pictures_of(wider, wider.validation_indices) > held_out


def test_samples_without_a_picture_are_held_out_one_by_one(write, pictures: str) -> None:
    for none in ({}, {"image": None}):
        records = [llava(f"text {i}", None, "2 + 2?", "4") | none for i in range(200)]
        source = LlavaConversations(write("train.json", records), pictures, validation_fraction=0.2)
        source.setup()
        assert 20 < len(source.validation_indices) < 60


def test_validation_of_questions_holds_out_whole_pictures(write, pictures: str) -> None:
    rows = [{"image": f"p{i % 100}.png", "text": f"{i}?", "answer": "yes"} for i in range(300)]
    source = QuestionAnswers(write("train.jsonl", rows), pictures, validation_fraction=0.3)
    source.setup()
    rows_of = [
        np.concatenate([source.rows(int(i)) for i in part]) % 100 for part in (train_indices(source), source.validation_indices)
    ]
    assert not set(rows_of[0]) & set(rows_of[1])
    assert len(rows_of[0]) + len(rows_of[1]) == 300


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_split_with_an_empty_side_is_an_error(fraction: float, write, pictures: str) -> None:
    source = LlavaConversations(write("train.json", CONVERSATIONS), pictures, validation_fraction=fraction)
    with pytest.raises(RecipeError, match="validation_fraction"):
        source.setup()


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        (
            "t.jsonl",
            llava("gone", "none.png", "<image>", "x"),
            r"t\.jsonl line 2, id gone: .*none\.png cannot be read \(No such file",
        ),
        (
            "t.json",
            llava("gone", "none.png", "<image>", "x"),
            r"t\.json line \d+ \(record 2\), id gone: .*none\.png cannot be read",
        ),
        ("t.jsonl", {"id": "bare"}, r"t\.jsonl line 2, id bare: `conversations` is missing"),
        ("t.jsonl", llava("odd", {"a": 1}, "<image>", "x"), r"t\.jsonl line 2, id odd: `image` must be"),
    ],
)
def test_bad_samples_name_file_line_and_id(name: str, record: dict[str, Any], message: str, write, pictures: str) -> None:
    source = LlavaConversations(write(name, [CONVERSATIONS[0], record, CONVERSATIONS[0]]), pictures)
    source.setup()
    with pytest.raises(BadSample, match=message):
        source.sample(1, random())


def test_a_missing_picture_of_questions_names_file_and_line(write, pictures: str) -> None:
    rows = [*QUESTIONS[:2], {"question_id": "q9", "image": "none.png", "text": "Why?", "answer": "So."}]
    source = QuestionAnswers(write("train.jsonl", rows), pictures)
    source.setup()
    lost = next(index for index in range(3) if 2 in source.rows(index))
    with pytest.raises(BadSample, match=r"train\.jsonl line 3, id q9: .*none\.png cannot be read"):
        source.sample(lost, random())


def test_a_damaged_line_is_a_bad_sample(tmp_path: Path, write, pictures: str) -> None:
    file = Path(write("train.jsonl", CONVERSATIONS))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]) + "\n")
    source = LlavaConversations(str(file), pictures)
    source.setup()
    with pytest.raises(BadSample, match=r"train\.jsonl line 2 is not valid JSON"):
        source.sample(1, random())


def test_missing_files_and_folders_are_named(write, pictures: str, tmp_path: Path) -> None:
    file = write("train.json", CONVERSATIONS)
    with pytest.raises(RecipeError, match=r"image folder nowhere of .*train\.json does not exist \(key images\)"):
        LlavaConversations(file, "nowhere").setup()
    with pytest.raises(RecipeError, match=r"There is no annotation file .*missing\.json"):
        LlavaConversations(str(tmp_path / "missing.json"), pictures).setup()


@pytest.mark.parametrize(
    "options", [
        {"weight": -1.0}, {"weight": None, "epochs": 0.0}, {"weight": None}, {"epochs": 2.0}, {"weight": None, "epochs": -1.0},
        {"weight": None, "samples": 0}, {"weight": None, "epochs": 1.0, "samples": 5}, {"validation_fraction": 1.0},
        {"validation_fraction": -0.1}, {"num_scenes": 0}, {"questions_per_scene": 0}, {"seed": -1},
    ],
)  # fmt: skip
def test_values_out_of_range_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        ShapesWorld(Setting(), **options)
    with pytest.raises(RecipeError, match="questions_per_sample is 0"):
        QuestionAnswers("a.jsonl", "pictures", questions_per_sample=0)


def test_workers_receive_indices_not_records(write, pictures: str) -> None:
    """Records stay in the mapped file: what a worker is handed holds a few numbers a sample, whatever the texts weigh."""
    count = 3_000
    long = "word " * 200
    conversations = LlavaConversations(write("c.json", [llava(i, "p1.png", "<image>", long) for i in range(count)]), pictures)
    rows = [{"image": f"p{i % 10}.png", "text": "Why?", "answer": long} for i in range(count)]
    questions = QuestionAnswers(write("q.jsonl", rows), pictures, questions_per_sample=3)
    sources: list[Source] = [conversations, questions]
    for source in sources:
        source.setup()
        sent = pickle.dumps(source)
        assert len(sent) < 25 * count, f"{len(sent) / count:.0f} bytes a record"
        received = pickle.loads(sent)
        assert received.sample(5, random(1)).turns == source.sample(5, random(1)).turns


def test_shapes_world_scenes_are_by_index_and_questions_by_stream() -> None:
    source = ShapesWorld(Setting(grid=2, max_objects=4, image_size=32), num_scenes=200, questions_per_scene=3)
    source.setup()
    one, again, asked_anew, other = (source.sample(i, random(seed)) for i, seed in ((5, 0), (5, 0), (5, 1), (6, 0)))
    assert one == again
    assert one.images == asked_anew.images != other.images
    assert one.turns[-1] == asked_anew.turns[-1]
    assert one.turns != asked_anew.turns
    assert [turn.role for turn in one.turns] == ["user", "assistant"] * (len(one.turns) // 2)
    assert one.turns[0].text.startswith("<image>\n")
    assert len({source.sample(i, random()).images[0] for i in range(200)}) == 200
    assert ShapesWorld(source.setting, 200, seed=1).sample(5, random()).images != one.images


def test_shapes_world_never_trains_on_held_out_pairs() -> None:
    source = ShapesWorld(Setting(grid=3, max_objects=5, image_size=16), num_scenes=500)
    captions = [source.sample(i, random()).turns[-1].text for i in range(500)]
    assert not [caption for caption in captions for color, shape in HELD_OUT_PAIRS if f"{color} {shape}" in caption]
    assert any("red circle" in caption for caption in captions)


def test_fingerprints_change_with_what_decides_the_samples(write, pictures: str) -> None:
    def print_of(source: Source) -> str:
        source.setup()
        return source.fingerprint()

    shorter = write("train.json", CONVERSATIONS[:-1])
    first = print_of(LlavaConversations(shorter, pictures))
    assert first != print_of(LlavaConversations(write("train.json", CONVERSATIONS), pictures))
    rows = write("q.jsonl", QUESTIONS)
    before = [print_of(QuestionAnswers(rows, pictures)), print_of(LlavaConversations(shorter, pictures))]
    for file, said, edited in ((rows, "answer 5", "answer 7"), (shorter, "A plane.", "A train.")):  # of equal length
        text = Path(file).read_text()
        assert said in text
        Path(file).write_text(text.replace(said, edited))
    after = [print_of(QuestionAnswers(rows, pictures)), print_of(LlavaConversations(shorter, pictures))]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert print_of(QuestionAnswers(rows, pictures, 1)) != print_of(QuestionAnswers(rows, pictures, 2))
    setting = Setting(grid=2, max_objects=2)
    worlds = [ShapesWorld(setting), ShapesWorld(Setting()), ShapesWorld(setting, 10), ShapesWorld(setting, seed=1)]
    worlds.append(ShapesWorld(setting, questions_per_scene=2))
    assert len(set(map(print_of, worlds))) == len(worlds)


def test_a_line_that_cannot_be_read_is_no_reason_to_hold_nothing_out(tmp_path: Path, write, pictures: str) -> None:
    file = Path(write("train.jsonl", many(images=10, samples=60)))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0][:40], "[" * 100_000, *lines[2:]]) + "\n")
    source = LlavaConversations(str(file), pictures, validation_fraction=0.3)
    source.setup()
    assert source.num_samples + len(source.validation_indices) == 60
    for line in (0, 1):
        with pytest.raises(BadSample, match=rf"line {line + 1} is not valid JSON"):
            source.sample(line, random())
