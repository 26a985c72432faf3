"""ShapesWorld: a benchmark of scenes that no training run has drawn, with pairs of color and shape that no training scene shows."""

import numpy as np

from components.benchmarks.benchmark import Benchmark, Question
from components.chat_template import IMAGE_PLACEHOLDER
from components.errors import RecipeError
from components.shapes_world import Setting, draw_scene


class ShapesWorld(Benchmark):
    """Nothing in, questions about scenes drawn by the program out: one of each kind a scene; scored by exact match.

    The kinds (color, shape, count, ...) are the groups. A kind is left out where a scene does not allow it.

    Args:
        setting: How hard the world is.
        num_scenes: Different scenes, >= 1.
        seed: Decides the scenes, >= 0. Training scenes never coincide with them, whatever their seed.

    Raises:
        RecipeError: A value out of range.
    """

    def __init__(self, setting: Setting, num_scenes: int = 500, seed: int = 12345) -> None:
        if num_scenes < 1 or seed < 0:
            raise RecipeError(f"ShapesWorld: num_scenes = {num_scenes} must be at least 1 and seed = {seed} at least 0.")
        self.setting = setting
        self.num_scenes = num_scenes
        self.seed = seed

    def setup(self, pictures: bool = True) -> None:
        """Draw the questions; pictures are drawn when they are read."""
        self._questions = []
        for number in range(self.num_scenes):
            random = self._random(number)
            self._questions += [
                Question(f"{number}-{q.kind}", f"{IMAGE_PLACEHOLDER}\n{q.text}", (str(number),), q.answer, q.kind)
                for q in draw_scene(self.setting, random, held_out_pairs=True).one_of_each_kind(random)
            ]

    def questions(self) -> list[Question]:
        """At most one of each kind for each scene."""
        return self._questions

    def read_image(self, name: str) -> bytes:
        """The scene of that number, drawn."""
        return draw_scene(self.setting, self._random(int(name)), held_out_pairs=True).picture()

    def describe(self) -> str:
        """The setting of the world."""
        return f"ShapesWorld, {self.setting}, {self.num_scenes} scenes with held-out pairs"

    def _random(self, scene: int) -> np.random.Generator:
        # training draws from Philox; another generator has no seed in common with it
        return np.random.Generator(np.random.PCG64([self.seed, scene]))
