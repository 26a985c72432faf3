"""ShapesWorld as training data: scenes drawn by the program."""

from typing import ClassVar

import numpy as np
from jaxtyping import Int64, UInt64

from components.data.order import SCENE, stream
from components.data.sources.base import AS_IN_DATA, Overrides, Sample, Source
from components.errors import RecipeError
from components.shapes_world import Scene, Setting, draw_scene
from components.turns import Turn


class ShapesWorld(Source):
    """Scenes drawn by the program, with questions and a caption after them; nothing is read from disk.

    Args:
        setting: How hard the world is.
        num_scenes: Different scenes, >= 1.
        questions_per_scene: Most questions in one conversation, >= 1.
        seed: Decides the scenes, >= 0.
        weight: Relative weight in the mixture, >= 0; 0 is not drawn before `data.weight_changes` says so. Null where `epochs` or
            `samples` says how much is drawn.
        epochs: How often a run draws each of its samples, > 0, instead of a weight; to a thousandth of the run.
        samples: How many samples a run draws from it, >= 1, instead of a weight; to a thousandth of the run.
        validation_fraction: Share of the scenes that is never trained on and gives `val/loss`, in [0, 1).
        overrides: What it prepares otherwise than the rest.
    """

    fixed_text: ClassVar[bool] = False

    def __init__(
        self,
        setting: Setting,
        num_scenes: int = 1_000_000,
        questions_per_scene: int = 5,
        seed: int = 0,
        weight: float | None = 1.0,
        epochs: float | None = None,
        samples: int | None = None,
        validation_fraction: float = 0.0,
        overrides: Overrides = AS_IN_DATA,
    ) -> None:
        super().__init__(weight, epochs, samples, validation_fraction, overrides)
        if num_scenes < 1 or questions_per_scene < 1 or seed < 0:
            raise RecipeError(
                f"data.sources: num_scenes {num_scenes} and questions_per_scene {questions_per_scene} must be at least 1, "
                f"seed {seed} at least 0."
            )
        self.setting = setting
        self.num_scenes = num_scenes
        self.questions_per_scene = questions_per_scene
        self.seed = seed

    def open(self) -> UInt64[np.ndarray, " samples"]:
        """Nothing to open: every scene is a picture of its own."""
        return np.arange(self.num_scenes, dtype=np.uint64)

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """Draw the scene; the questions asked about it differ from epoch to epoch."""
        scene = self._scene(index)
        return Sample(f"scene {index}", self._turns(scene, random), [scene.picture()])

    def text(self, index: int, random: np.random.Generator) -> tuple[str, list[Turn], int]:
        """The conversation about the scene."""
        return f"scene {index}", self._turns(self._scene(index), random), 1

    def _scene(self, index: int) -> Scene:
        return draw_scene(self.setting, stream(self.seed, SCENE, index), held_out_pairs=False)

    def _turns(self, scene: Scene, random: np.random.Generator) -> list[Turn]:
        turns = []
        for question in scene.conversation(random)[: self.questions_per_scene]:
            turns += [Turn("user", question.text), Turn("assistant", question.answer)]
        # the caption comes last: before the questions, their answers could be copied from it
        turns += [Turn("user", "describe the picture"), Turn("assistant", scene.caption())]
        turns[0] = Turn("user", f"<image>\n{turns[0].text}")
        return turns

    def estimate(self, indices: Int64[np.ndarray, " samples"], tokens_per_image: int) -> Int64[np.ndarray, " samples"]:
        """All scenes are taken as equally long."""
        return np.full(len(indices), tokens_per_image + 16 * self.questions_per_scene)

    def describe(self) -> str:
        """The setting of the world."""
        return f"ShapesWorld, {self.setting}"

    def fingerprint(self) -> str:
        """The setting and the seed."""
        return f"ShapesWorld:{self.setting}:{self.num_scenes}:{self.questions_per_scene}:{self.seed}"
