"""ShapesWorld: what is asked can be answered from the picture, the answers are right, and pairs held out of training stay out."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from components.images import decode
from components.shapes_world import (
    BACKGROUND,
    COLORS,
    HELD_OUT_PAIRS,
    KINDS,
    SHAPES,
    WORDS,
    Question,
    Scene,
    Setting,
    Thing,
    draw_scene,
)
from components.tokenizer import WordTokenizer

SETTINGS = [Setting(grid=2, max_objects=4, image_size=64), Setting(grid=3, max_objects=5, image_size=96)]


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def scenes(setting: Setting, count: int = 300, held_out_pairs: bool = True) -> list[Scene]:
    return [draw_scene(setting, random(seed), held_out_pairs) for seed in range(count)]


def asked(scene: Scene, seed: int) -> list[Question]:
    return scene.conversation(random(seed)) + scene.one_of_each_kind(random(seed))


# --- answers, derived anew from what is drawn where


def place(thing: Thing, grid: int) -> str:
    """Where the center of a thing is in the picture, in words."""
    x, y = (thing.column + thing.center[0]) / grid, (thing.row + thing.center[1]) / grid
    if grid == 2:
        return f"{'top' if y < 0.5 else 'bottom'}-{'left' if x < 0.5 else 'right'}"
    vertical, horizontal = ("top", "", "bottom")[int(y * 3)], ("left", "", "right")[int(x * 3)]
    return "-".join(filter(None, (vertical, horizontal))) or "center"


def one(things: list[Thing]) -> Thing:
    assert len(things) == 1, "the question does not name one object"
    return things[0]


def at(scene: Scene, where: str) -> Thing:
    return one([thing for thing in scene.things if place(thing, scene.setting.grid) == where])


def colored(scene: Scene, color: str) -> Thing:
    return one([thing for thing in scene.things if thing.color == color])


def relation(scene: Scene, first: str, axis: str, second: str) -> str:
    a, b = colored(scene, first), colored(scene, second)
    if axis == "left or right of":
        return "left" if a.column + a.center[0] < b.column + b.center[0] else "right"
    return "above" if a.row + a.center[1] < b.row + b.center[1] else "below"


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


C, S = "|".join(COLORS), "|".join(SHAPES)
ANSWERS: dict[str, Callable[..., str]] = {
    r"what color is the object at the ([\w-]+)": lambda scene, where: at(scene, where).color,
    r"what shape is the object at the ([\w-]+)": lambda scene, where: at(scene, where).shape,
    rf"what shape is the ({C}) object": lambda scene, color: colored(scene, color).shape,
    rf"where is the ({C}) object": lambda scene, color: place(colored(scene, color), scene.setting.grid),
    r"how many objects are there": lambda scene: str(len(scene.things)),
    rf"is there a ({C}) object": lambda scene, color: yes(any(thing.color == color for thing in scene.things)),
    rf"is there a ({S})": lambda scene, shape: yes(any(thing.shape == shape for thing in scene.things)),
    rf"is the ({C}) object (left or right of|above or below) the ({C}) object": relation,
}


def derived(scene: Scene, question: Question) -> str:
    found = [(answer, match) for text, answer in ANSWERS.items() if (match := re.fullmatch(text, question.text))]
    assert len(found) == 1, f"no one reading of: {question.text}"
    answer, match = found[0]
    return answer(scene, *match.groups())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_question_has_one_answer_and_it_is_given(setting: Setting) -> None:
    kinds: Counter[str] = Counter()
    for seed, scene in enumerate(scenes(setting)):
        for question in asked(scene, seed):
            assert question.answer == derived(scene, question), question
            kinds[question.kind] += 1
    assert min(kinds[kind] for kind in KINDS) > 100, kinds


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_picture_shows_each_object_in_its_place_and_color(setting: Setting) -> None:
    for scene in scenes(setting, 40):
        pixels = np.asarray(decode(scene.picture()))
        assert pixels.shape == (setting.image_size, setting.image_size, 3)
        cell = setting.image_size / setting.grid
        for thing in scene.things:
            x, y = int((thing.column + thing.center[0]) * cell), int((thing.row + thing.center[1]) * cell)
            assert tuple(pixels[y, x]) == COLORS[thing.color], thing
        cells = {(thing.row, thing.column) for thing in scene.things}
        assert len(cells) == len(scene.things)
        for row in range(setting.grid):
            for column in range(setting.grid):
                part = pixels[
                    int(row * cell + 1) : int((row + 1) * cell - 1), int(column * cell + 1) : int((column + 1) * cell - 1)
                ]
                assert ((part == BACKGROUND).all()) == ((row, column) not in cells)


def test_shapes_look_different() -> None:
    setting = Setting(grid=2, min_objects=1, max_objects=1, image_size=64)
    drawn = [Scene(setting, (Thing("red", shape, 0, 0, (0.5, 0.5), 0.4),)).picture() for shape in SHAPES]
    assert len(set(drawn)) == len(SHAPES)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_captions_tell_every_object_in_reading_order(setting: Setting) -> None:
    for scene in scenes(setting, 50):
        told = re.findall(rf"a ({C}) ({S}) at the ([\w-]+)", scene.caption())
        ordered = sorted(scene.things, key=lambda thing: (thing.row + thing.center[1] // 1, thing.column))
        assert told == [(thing.color, thing.shape, place(thing, setting.grid)) for thing in ordered]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_words_cover_every_text(setting: Setting) -> None:
    tokenizer = WordTokenizer(list(WORDS)).build()
    texts = {"describe the picture"}
    for seed, scene in enumerate(scenes(setting)):
        texts |= {scene.caption(), *(text for question in asked(scene, seed) for text in (question.text, question.answer))}
    for text in texts:
        pieces = tokenizer.tokenize(text)
        assert len(pieces) == len(text.split()), f"{text}: {pieces}"
    assert len(set(WORDS)) == len(WORDS)


def test_pairs_held_out_of_training_are_seen_in_evaluation_alone() -> None:
    setting = SETTINGS[1]
    trained_on = {(thing.color, thing.shape) for scene in scenes(setting, held_out_pairs=False) for thing in scene.things}
    assert trained_on == {(color, shape) for color in COLORS for shape in SHAPES} - HELD_OUT_PAIRS
    assert not any(scene.shows_held_out_pair() for scene in scenes(setting, held_out_pairs=False))
    evaluated = scenes(setting)
    assert {(thing.color, thing.shape) for scene in evaluated for thing in scene.things} > HELD_OUT_PAIRS
    assert 0.2 < np.mean([scene.shows_held_out_pair() for scene in evaluated]) < 0.8
    # every color and every shape is trained on, only not together
    assert {color for color, _ in trained_on} == set(COLORS)
    assert {shape for _, shape in trained_on} == set(SHAPES)


def test_a_seed_decides_scene_picture_and_questions() -> None:
    one, same, other = (draw_scene(SETTINGS[0], random(seed), held_out_pairs=False) for seed in (3, 3, 4))
    assert one == same
    assert one.picture() == same.picture() != other.picture()
    assert one.conversation(random(1)) == same.conversation(random(1))
    assert one.conversation(random(1)) != one.conversation(random(2))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_answers_cannot_be_guessed(setting: Setting) -> None:
    """Yes and no, and the two sides of each relation, come about as often."""
    answers: dict[str, Counter[str]] = {}
    for seed, scene in enumerate(scenes(setting, 1_500, held_out_pairs=False)):
        for question in scene.conversation(random(seed)):
            first = question.text.split()[0] + ("" if "or" not in question.text.split() else " or")
            answers.setdefault(f"{question.kind} {first}", Counter())[question.answer] += 1
    yes_or_no = answers["existence is"]
    assert abs(yes_or_no["yes"] / yes_or_no.total() - 0.5) < 0.05, yes_or_no
    relations = answers["relation is or"]
    for one_side, other_side in (("left", "right"), ("above", "below")):
        assert abs(relations[one_side] / (relations[one_side] + relations[other_side]) - 0.5) < 0.05, relations


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_objects_do_not_share_a_color(setting: Setting) -> None:
    for scene in scenes(setting):
        assert len({thing.color for thing in scene.things}) == len(scene.things)
        assert setting.min_objects <= len(scene.things) <= setting.max_objects


@pytest.mark.parametrize(
    "values",
    [
        {"grid": 1},
        {"grid": 4},
        {"min_objects": 0},
        {"min_objects": 4, "max_objects": 3},
        {"max_objects": 7},
        {"grid": 2, "max_objects": 5},
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="grid must be 2 or 3 and 1 <= min_objects <= max_objects"):
        Setting(**values)
