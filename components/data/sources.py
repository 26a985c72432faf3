"""Sources of samples: LLaVA conversations, questions with answers, and ShapesWorld."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from components.annotations import Annotations
from components.data.order import SCENE, stream
from components.errors import BadSample, RecipeError
from components.shapes_world import Setting, draw_scene
from components.turns import Turn, parse_llava

_BYTES_PER_TOKEN = 4  # of English text; lengths only balance the micro-batches, they need not be exact
_MIB = 2**20


@dataclass
class Sample:
    """A conversation and the bytes of its pictures.

    Args:
        id: Name of the sample, unique in its source.
        turns: The conversation; `<image>` marks each picture's place.
        images: Encoded pictures in the order of their places.
    """

    id: str
    turns: list[Turn]
    images: list[bytes]


class Source(ABC):
    """Where samples come from, with their share of the mixture.

    Args:
        weight: Relative weight in the mixture, > 0.
        validation_fraction: Share of the pictures that is never trained on and gives `val/loss`, in [0, 1).
    """

    def __init__(self, weight: float, validation_fraction: float) -> None:
        if weight <= 0 or not 0 <= validation_fraction < 1:
            raise RecipeError(f"data.sources: weight {weight} must be > 0, validation_fraction {validation_fraction} in [0, 1).")
        self.weight = weight
        self.validation_fraction = validation_fraction

    def setup(self) -> None:
        """Open the files and split the samples. Called once a process, before the workers start."""
        held_out = _mix(self.open()) < self.validation_fraction
        self.train_indices = np.flatnonzero(~held_out)
        self.validation_indices = np.flatnonzero(held_out)
        if not len(self.train_indices):
            raise RecipeError(f"{self.describe()}: no sample is left to train on. Lower validation_fraction.")
        if self.validation_fraction and not len(self.validation_indices):
            raise RecipeError(
                f"{self.describe()}: validation_fraction {self.validation_fraction} holds out none of {len(held_out)} samples. "
                "Raise it."
            )

    @abstractmethod
    def open(self) -> np.ndarray:
        """Open the files; returns one number (uint64) for each sample, equal for samples that show the same picture."""

    @abstractmethod
    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """The sample at an index; `random` decides whatever is random in it.

        Raises:
            BadSample: It cannot be used; the message names file, line and id.
        """

    @abstractmethod
    def length(self, index: int, tokens_per_image: int) -> int:
        """About how many tokens the sample becomes."""

    def where(self, index: int) -> str:
        """Where the sample at an index stands, for error messages."""
        return f"{self.describe()}, sample {index}"

    @abstractmethod
    def describe(self) -> str:
        """The source in a few words, for start-up and error messages."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the samples or their order change."""


class _Folder:
    """Pictures by name in a folder, checked to exist before anything starts."""

    def __init__(self, path: str, annotations: str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise RecipeError(
                f"The image folder {path} of {annotations} does not exist (key images). "
                "Give the folder that the picture names in the annotations are relative to."
            )

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise BadSample(
                f"picture {self.path / name} cannot be read ({error.strerror}). Restore it or remove the sample."
            ) from error


class LlavaConversations(Source):
    """LLaVA conversation files in, samples out: JSON or JSONL with `id`, `image` and `conversations`.

    Args:
        annotations: The JSON or JSONL file.
        images: Folder that picture names are relative to.
        weight: Relative weight in the mixture, > 0.
        validation_fraction: Share of the pictures that is never trained on and gives `val/loss`, in [0, 1).

    Source: https://github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md.
    """

    def __init__(self, annotations: str, images: str, weight: float = 1.0, validation_fraction: float = 0.0) -> None:
        super().__init__(weight, validation_fraction)
        self.annotations = annotations
        self.images = images

    def open(self) -> np.ndarray:
        """Open the annotations; samples of one picture belong together."""
        self.records = Annotations(self.annotations)
        self.folder = _Folder(self.images, self.annotations)
        if not self.validation_fraction:
            return np.arange(len(self.records), dtype=np.uint64)
        return _group_numbers(str(record.get("image") or record.get("id", i)) for i, record in enumerate(self.records))

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """The conversation at a place in the file."""
        record = self.records[index]
        name = str(record.get("id", index))
        try:
            turns, images = parse_llava(record)
            return Sample(name, turns, [self.folder.read(image) for image in images])
        except BadSample as error:
            raise BadSample(f"{self.where(index)}, id {name}: {error}") from error

    def where(self, index: int) -> str:
        """File and line."""
        return self.records.where(index)

    def length(self, index: int, tokens_per_image: int) -> int:
        """Estimated from the size of the record."""
        return tokens_per_image + self.records.num_bytes(index) // _BYTES_PER_TOKEN

    def describe(self) -> str:
        """File and folder."""
        return f"{self.annotations} with pictures in {self.images}"

    def fingerprint(self) -> str:
        """File name, size, number of records and a digest of the file's ends."""
        return f"{Path(self.annotations).name}:{self.records.size}:{len(self.records)}:{_digest_of_ends(self.annotations)}"


class QuestionAnswers(Source):
    """Question and answer files in, samples out: JSONL with `image`, `text` and `answer`; questions of one picture share a sample.

    Args:
        annotations: The JSONL file.
        images: Folder that picture names are relative to.
        questions_per_sample: Most questions about one picture in one conversation, >= 1; drawn anew, in a new order, in every
            epoch.
        weight: Relative weight in the mixture, > 0.
        validation_fraction: Share of the pictures that is never trained on and gives `val/loss`, in [0, 1).
    """

    def __init__(
        self,
        annotations: str,
        images: str,
        questions_per_sample: int = 1,
        weight: float = 1.0,
        validation_fraction: float = 0.0,
    ) -> None:
        super().__init__(weight, validation_fraction)
        if questions_per_sample < 1:
            raise RecipeError(f"data.sources: questions_per_sample is {questions_per_sample}; it must be at least 1.")
        self.annotations = annotations
        self.images = images
        self.questions_per_sample = questions_per_sample

    def open(self) -> np.ndarray:
        """Open the annotations and gather the rows of each picture."""
        self.records = Annotations(self.annotations)
        self.folder = _Folder(self.images, self.annotations)
        names = []
        for index, record in enumerate(self.records):
            if missing := [key for key in ("image", "text", "answer") if not isinstance(record.get(key), str)]:
                raise RecipeError(
                    f"{self.records.where(index)}: {', '.join(missing)} missing or not a text. "
                    "Each line needs image, text and answer."
                )
            names.append(record["image"])
        groups = _group_numbers(names)
        order = np.argsort(groups, kind="stable")
        numbers, starts = np.unique(groups[order], return_index=True)
        self.rows_in_order, self.bounds = order, np.append(starts, len(order))  # two arrays: workers share their pages
        return numbers

    def rows(self, index: int) -> np.ndarray:
        """Rows of the file that ask about one picture."""
        return self.rows_in_order[self.bounds[index] : self.bounds[index + 1]]

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """Questions about one picture, in random order, in one conversation."""
        rows = self.rows(index)
        chosen = random.permutation(rows)[: self.questions_per_sample]
        records = [self.records[int(row)] for row in chosen]
        turns = []
        for number, record in enumerate(records):
            turns += [Turn("user", record["text"] if number else f"<image>\n{record['text']}"), Turn("assistant", record["answer"])]
        name = str(self.records[int(rows[0])].get("question_id", rows[0]))
        try:
            return Sample(name, turns, [self.folder.read(records[0]["image"])])
        except BadSample as error:
            raise BadSample(f"{self.where(index)}, id {name}: {error}") from error

    def where(self, index: int) -> str:
        """File and line of the first question about the picture."""
        return self.records.where(int(self.rows(index)[0]))

    def length(self, index: int, tokens_per_image: int) -> int:
        """Estimated from the size of the rows."""
        rows = self.rows(index)
        asked = min(len(rows), self.questions_per_sample)
        return tokens_per_image + asked * self.records.num_bytes(int(rows[0])) // _BYTES_PER_TOKEN

    def describe(self) -> str:
        """File and folder."""
        return f"{self.annotations} with pictures in {self.images}"

    def fingerprint(self) -> str:
        """File name, size, number of rows, a digest of the file's ends, and questions in a sample."""
        file = f"{Path(self.annotations).name}:{self.records.size}:{len(self.records)}:{_digest_of_ends(self.annotations)}"
        return f"{file}:{self.questions_per_sample}"


class ShapesWorld(Source):
    """Scenes drawn by the program, with questions and a caption after them; nothing is read from disk.

    Args:
        setting: How hard the world is.
        num_scenes: Different scenes, >= 1.
        questions_per_scene: Most questions in one conversation, >= 1.
        seed: Decides the scenes, >= 0.
        weight: Relative weight in the mixture, > 0.
        validation_fraction: Share of the scenes that is never trained on and gives `val/loss`, in [0, 1).
    """

    def __init__(
        self,
        setting: Setting,
        num_scenes: int = 1_000_000,
        questions_per_scene: int = 5,
        seed: int = 0,
        weight: float = 1.0,
        validation_fraction: float = 0.0,
    ) -> None:
        super().__init__(weight, validation_fraction)
        if num_scenes < 1 or questions_per_scene < 1 or seed < 0:
            raise RecipeError(
                f"data.sources: num_scenes {num_scenes} and questions_per_scene {questions_per_scene} must be at least 1, "
                f"seed {seed} at least 0."
            )
        self.setting = setting
        self.num_scenes = num_scenes
        self.questions_per_scene = questions_per_scene
        self.seed = seed

    def open(self) -> np.ndarray:
        """Nothing to open: every scene is a picture of its own."""
        return np.arange(self.num_scenes, dtype=np.uint64)

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """Draw the scene; the questions asked about it differ from epoch to epoch."""
        scene = draw_scene(self.setting, stream(self.seed, SCENE, index), held_out_pairs=False)
        turns = []
        for question in scene.conversation(random)[: self.questions_per_scene]:
            turns += [Turn("user", question.text), Turn("assistant", question.answer)]
        # the caption comes last: before the questions, their answers could be copied from it
        turns += [Turn("user", "describe the picture"), Turn("assistant", scene.caption())]
        turns[0] = Turn("user", f"<image>\n{turns[0].text}")
        return Sample(f"scene {index}", turns, [scene.picture()])

    def length(self, index: int, tokens_per_image: int) -> int:
        """All scenes are taken as equally long."""
        return tokens_per_image + 16 * self.questions_per_scene

    def describe(self) -> str:
        """The setting of the world."""
        return f"ShapesWorld, {self.setting}"

    def fingerprint(self) -> str:
        """The setting and the seed."""
        return f"ShapesWorld:{self.setting}:{self.num_scenes}:{self.questions_per_scene}:{self.seed}"


def _digest_of_ends(path: str) -> str:
    """Of the first and the last MiB: notices an edit of equal length there, and costs the same for a file of any size."""
    with Path(path).open("rb") as file:
        first = file.read(_MIB)
        file.seek(max(0, Path(path).stat().st_size - _MIB))
        return hashlib.blake2b(first + file.read(_MIB), digest_size=8).hexdigest()


def _group_numbers(names) -> np.ndarray:  # noqa: ANN001
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Numbers to uniform [0, 1): the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = numbers + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64
