"""ShapesWorld: scenes drawn by the program, with captions and questions; training data and exam that need no download."""

import io
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from components.errors import RecipeError

COLORS = {
    "red": (255, 80, 80),
    "green": (80, 220, 90),
    "blue": (80, 130, 255),
    "yellow": (250, 220, 80),
    "purple": (200, 100, 255),
    "white": (250, 250, 250),
}
BACKGROUND = (90, 90, 90)
"""Darker than every object, and near zero once normalised: an empty patch does not drown its position."""

SHAPES = ("circle", "square", "triangle", "cross")
KINDS = ("color", "shape", "count", "existence", "relation")
HELD_OUT_PAIRS = frozenset({("red", "cross"), ("green", "triangle"), ("blue", "circle"), ("purple", "square")})
"""Pairs of color and shape that no training scene shows and evaluation scenes do."""

WORDS = tuple(
    "Q: A: what color shape is the how many are there picture a at left or right above below of where object objects yes no and "
    "describe 0 1 2 3 4 5 6 top bottom center top-left top-right bottom-left bottom-right".split()
) + (*COLORS, *SHAPES)
"""Every word that a scene's questions, answers and caption use: for a `WordTokenizer`."""

_OVERSAMPLING = 4  # drawn larger and averaged down, so that edges are smooth
_PLACES = {
    2: (("top-left", "top-right"), ("bottom-left", "bottom-right")),
    3: (("top-left", "top", "top-right"), ("left", "center", "right"), ("bottom-left", "bottom", "bottom-right")),
}


@dataclass(frozen=True)
class Setting:
    """How hard the world is.

    Args:
        grid: Positions along each side, 2 or 3: objects stand at grid x grid positions.
        min_objects: Fewest objects in a scene, at least 1.
        max_objects: Most objects in a scene, at most 6 and at most grid x grid.
        image_size: Side of the picture in pixels.
    """

    grid: int = 3
    min_objects: int = 1
    max_objects: int = 5
    image_size: int = 64

    def __post_init__(self) -> None:
        if self.grid not in (2, 3) or not 1 <= self.min_objects <= self.max_objects <= min(6, self.grid**2):
            raise RecipeError(
                f"ShapesWorld setting {self}: grid must be 2 or 3 and 1 <= min_objects <= max_objects <= min(6, grid * grid)"
            )

    def __str__(self) -> str:
        objects = f"{self.min_objects}-{self.max_objects} objects"
        return f"{self.grid} x {self.grid} positions, {objects}, {self.image_size} px"


@dataclass(frozen=True)
class Thing:
    """One object: what it is, its cell, and its center and radius in units of the cell."""

    color: str
    shape: str
    row: int
    column: int
    center: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Question:
    """A question about a scene, with its kind and answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """Objects on a grid. No two share a color, so that "the red object" names one."""

    setting: Setting
    things: tuple[Thing, ...]

    def picture(self) -> bytes:
        """The scene as the bytes of a BMP picture (uncompressed: quick to write and to read)."""
        size = self.setting.image_size * _OVERSAMPLING
        cell = size / self.setting.grid
        image = Image.new("RGB", (size, size), BACKGROUND)
        canvas = ImageDraw.Draw(image)
        for thing in self.things:
            x, y = (thing.column + thing.center[0]) * cell, (thing.row + thing.center[1]) * cell
            _draw(canvas, thing.shape, x, y, thing.radius * cell, COLORS[thing.color])
        buffer = io.BytesIO()
        image.reduce(_OVERSAMPLING).save(buffer, "BMP")
        return buffer.getvalue()

    def caption(self) -> str:
        """Every object with its place, in reading order."""
        ordered = sorted(self.things, key=lambda thing: (thing.row, thing.column))
        return " and ".join(f"a {thing.color} {thing.shape} at the {self._place(thing)}" for thing in ordered)

    def shows_held_out_pair(self) -> bool:
        """Whether an object is of a color and shape that training never shows together."""
        return any((thing.color, thing.shape) in HELD_OUT_PAIRS for thing in self.things)

    def conversation(self, random: np.random.Generator) -> list[Question]:
        """Questions for one conversation, in random order, none of which gives another's answer away.

        A scene is asked what stands at its places, or what is there, or about things by their color, but not all at once: told that
        the red object is left of the blue one, a model would read from the text, not from the picture, what colors there are.
        """
        subjects = (self._at_places, self._what_is_there, self._by_color)
        asked = subjects[random.integers(len(subjects))](random)
        return [asked[i] for i in random.permutation(len(asked))]

    def one_of_each_kind(self, random: np.random.Generator) -> list[Question]:
        """A question of every kind that the scene allows, drawn at random: an exam."""
        asked = self._at_places(random) + self._what_is_there(random) + self._by_color(random)
        drawn = {asked[i].kind: asked[i] for i in random.permutation(len(asked))}
        return [drawn[kind] for kind in KINDS if kind in drawn]

    def _at_places(self, random: np.random.Generator) -> list[Question]:
        asked = []
        for thing in self.things:
            asked.append(Question("color", f"what color is the object at the {self._place(thing)}", thing.color))
            asked.append(Question("shape", f"what shape is the object at the {self._place(thing)}", thing.shape))
        return asked

    def _what_is_there(self, random: np.random.Generator) -> list[Question]:
        asked = [Question("count", "how many objects are there", str(len(self.things)))]
        for kind, names in (("color", list(COLORS)), ("shape", list(SHAPES))):
            there = {getattr(thing, kind) for thing in self.things}
            shuffled = [names[i] for i in random.permutation(len(names))]
            for _ in range(2):  # yes or no by chance, whatever the answers before
                present = random.random() < 0.5
                if name := next((name for name in shuffled if (name in there) == present), None):
                    shuffled.remove(name)
                    text = f"is there a {name} object" if kind == "color" else f"is there a {name}"
                    asked.append(Question("existence", text, "yes" if present else "no"))
        return asked

    def _by_color(self, random: np.random.Generator) -> list[Question]:
        asked = []
        for thing in self.things:
            if random.random() < 0.5:
                asked.append(Question("shape", f"what shape is the {thing.color} object", thing.shape))
            else:
                asked.append(Question("place", f"where is the {thing.color} object", self._place(thing)))
        relations = []
        for first, second in itertools.permutations(self.things, 2):
            pair = f"is the {first.color} object {{}} the {second.color} object"
            if first.column != second.column:
                answer = "left" if first.column < second.column else "right"
                relations.append(Question("relation", pair.format("left or right of"), answer))
            if first.row != second.row:
                answer = "above" if first.row < second.row else "below"
                relations.append(Question("relation", pair.format("above or below"), answer))
        return asked + [relations[i] for i in random.permutation(len(relations))[:2]]

    def _place(self, thing: Thing) -> str:
        return _PLACES[self.setting.grid][thing.row][thing.column]


def draw_scene(setting: Setting, random: np.random.Generator, held_out_pairs: bool) -> Scene:
    """A scene drawn at random.

    Args:
        setting: How hard the world is.
        random: Generator that decides everything about the scene.
        held_out_pairs: Whether objects may be of the pairs held out of training.
    """
    count = int(random.integers(setting.min_objects, setting.max_objects + 1))
    cells = random.choice(setting.grid**2, size=count, replace=False)
    colors = random.choice(list(COLORS), size=count, replace=False)
    things = []
    for cell, color in zip(cells, colors, strict=True):
        shapes = [shape for shape in SHAPES if held_out_pairs or (color, shape) not in HELD_OUT_PAIRS]
        radius = random.uniform(0.3, 0.42)
        center = random.uniform(radius, 1 - radius, size=2)
        row, column = divmod(int(cell), setting.grid)
        things.append(Thing(str(color), str(random.choice(shapes)), row, column, (center[0], center[1]), radius))
    return Scene(setting, tuple(things))


def _draw(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, color: tuple[int, int, int]) -> None:
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        side = r * 0.85
        canvas.rectangle((x - side, y - side, x + side, y + side), fill=color)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x - r, y + r * 0.8), (x + r, y + r * 0.8)], fill=color)
    else:
        arm = r / 3
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=color)
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=color)
