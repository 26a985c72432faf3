"""Scenes of the exam: always the same, asked once in each kind, and never those of training."""

import numpy as np
import pytest

from components.benchmarks import ShapesWorld
from components.data import ShapesWorld as TrainingScenes
from components.errors import RecipeError
from components.images import decode
from components.shapes_world import BACKGROUND, COLORS, KINDS, Setting, draw_scene

SETTING = Setting(grid=2, min_objects=1, max_objects=3, image_size=32)


def exam(**changes):
    made = ShapesWorld(**{"setting": SETTING, "num_scenes": 60, **changes})
    made.setup()
    return made


def test_the_same_questions_and_pictures_every_time():
    first, again = exam(), exam()
    assert first.questions() == again.questions()
    assert first.read_image("17") == again.read_image("17")
    assert first.questions() == again.questions() != exam(seed=1).questions()


def test_at_most_one_question_of_each_kind_for_each_scene():
    questions = exam().questions()
    asked = [(question.images, question.group) for question in questions]
    assert len(set(asked)) == len(asked) == len({question.id for question in questions})
    assert {images for images, _ in asked} == {(str(number),) for number in range(60)}
    assert {kind for _, kind in asked} == set(KINDS)
    assert all(question.prompt.startswith("<image>\n") for question in questions)


def test_a_relation_is_not_asked_about_one_object():
    assert "relation" not in {question.group for question in exam(setting=Setting(2, 1, 1, 32)).questions()}


def test_the_picture_is_of_the_scene_that_is_asked_about():
    made = exam(setting=Setting(3, 1, 1, 96))
    colors = {color: COLORS[color] for color in ("red", "green", "blue")}
    checked = 0
    for question in made.questions():
        if question.group == "color" and question.reference in colors:
            pixels = np.asarray(decode(made.read_image(question.images[0]))).reshape(-1, 3)
            drawn = pixels[(pixels != BACKGROUND).any(1)]
            assert tuple(np.median(drawn, axis=0)) == pytest.approx(colors[question.reference], abs=3)
            checked += 1
    assert checked > 10


def test_no_scene_of_training_even_with_the_same_seed():
    training = TrainingScenes(SETTING, num_scenes=400, seed=12345)
    random = np.random.default_rng(0)
    trained_on = {training.sample(index, random).images[0] for index in range(400)}
    made = exam(seed=12345)
    assert len(trained_on) == 400
    assert not trained_on & {made.read_image(str(number)) for number in range(60)}


def test_scenes_show_pairs_that_training_never_shows(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "components.benchmarks.shapes_world.draw_scene", lambda *a, **k: drawn.append(draw_scene(*a, **k)) or drawn[-1]
    )
    made = exam()
    shown = [scene for scene in drawn if scene.shows_held_out_pair()]
    assert len(drawn) == 60
    assert 10 < len(shown) < 50
    assert made.read_image("17") == drawn[17].picture()


@pytest.mark.parametrize("values", [{"num_scenes": 0}, {"seed": -1}])
def test_values_out_of_range(values):
    with pytest.raises(RecipeError, match=str(next(iter(values.values())))):
        ShapesWorld(SETTING, **values)
