"""ShapesWorld: scenes drawn by the program, with captions and questions; training data and exam that need no download."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = ("color", "shape", "count", "existence", "relation")
HELD_OUT_PAIRS = frozenset({("red", "cross"), ("green", "triangle"), ("blue", "circle"), ("purple", "square")})
"""Pairs of color and shape that no training scene shows and evaluation scenes do."""

WORDS = tuple(
    "Q: A: what color shape is the how many are there in picture a an at left right above below of object objects yes no and "
    "describe circles squares triangles crosses 0 1 2 3 4 5 top middle bottom center".split()
) + (*COLORS, *SHAPES)
"""Every word that a scene's questions, answers and caption use: for a `WordTokenizer`."""

_OVERSAMPLING = 4  # drawn larger and averaged down, so that edges are smooth
_ROWS = {1: ("middle",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMNS = {1: ("center",), 2: ("left", "right"), 3: ("left", "center", "right")}


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
            raise ValueError(f"{self}: grid must be 2 or 3 and 1 <= min_objects <= max_objects <= min(6, grid * grid)")

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
        image = Image.new("RGB", (size, size), (245, 245, 245))
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

    def questions(self, random: np.random.Generator) -> list[Question]:
        """Questions about the scene, several of each kind that it allows, in random order.

        In one conversation an earlier answer can give a later one away ("red", "circle", hence a red circle exists), and a model would
        learn to read instead of to look. So questions that name colors or shapes tend to come before those that answer with one.
        """
        things = [self.things[i] for i in random.permutation(len(self.things))]
        shapes = [thing.shape for thing in things]
        asked = []
        for thing in things:
            asked.append(Question("color", f"what color is the object at the {self._place(thing)}", thing.color))
            asked.append(Question("shape", f"what shape is the object at the {self._place(thing)}", thing.shape))
        asked.append(Question("count", "how many objects are there", str(len(things))))
        shape = str(random.choice(SHAPES if random.random() < 0.5 else shapes))
        plural = "crosses" if shape == "cross" else f"{shape}s"
        asked.append(Question("count", f"how many {plural} are there", str(shapes.count(shape))))
        asked += [self._existence(things, random, present) for present in (True, False)]
        if len(things) > 1:
            asked.append(_relation(things[0], things[1], random))
        places = random.random(len(asked)) + [0.7 * (question.kind in ("color", "shape")) for question in asked]
        return [asked[i] for i in np.argsort(places)]

    def _existence(self, things: list[Thing], random: np.random.Generator, present: bool) -> Question:
        if present:
            color, shape = things[0].color, things[0].shape
        else:  # the color is there, only on another shape: a hard no
            absent = [(thing.color, shape) for thing in things for shape in SHAPES if shape != thing.shape]
            color, shape = absent[random.integers(len(absent))]
        return Question("existence", f"is there a {color} {shape}", "yes" if present else "no")

    def _place(self, thing: Thing) -> str:
        return f"{_ROWS[self.setting.grid][thing.row]} {_COLUMNS[self.setting.grid][thing.column]}"


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


def _relation(first: Thing, second: Thing, random: np.random.Generator) -> Question:
    """A yes-or-no question about how two objects lie to each other, along an axis in which they differ."""
    axes = [axis for axis, differs in (("x", first.column != second.column), ("y", first.row != second.row)) if differs]
    axis = str(random.choice(axes))
    if axis == "x":
        word, other, true = "left of", "right of", first.column < second.column
    else:
        word, other, true = "above", "below", first.row < second.row
    if random.random() < 0.5:
        word, true = other, not true
    return Question("relation", f"is the {first.color} object {word} the {second.color} object", "yes" if true else "no")


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
