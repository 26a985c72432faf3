"""Question and answer files: JSONL with pictures in a folder."""

from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64, UInt64

from components.annotations import Annotations
from components.data.sources.base import AS_IN_DATA, BYTES_PER_TOKEN, Overrides, Sample, Source, file_fingerprint, group_numbers
from components.data.sources.folder import Folder
from components.errors import BadSample, RecipeError
from components.turns import Turn


class QuestionAnswers(Source):
    """Question and answer files in, samples out: JSONL with `image`, `text` and `answer`; questions of one picture share a sample.

    Args:
        annotations: The JSONL file.
        images: Folder that picture names are relative to.
        questions_per_sample: Most questions about one picture in one conversation, >= 1; drawn anew, in a new order, in every
            epoch.
        follow_links: Whether links inside the folder may lead out of it.
        weight: Relative weight in the mixture, >= 0; 0 is not drawn before `data.weight_changes` says so. Null where `epochs` or
            `samples` says how much is drawn.
        epochs: How often a run draws each of its samples, > 0, instead of a weight; to a thousandth of the run.
        samples: How many samples a run draws from it, >= 1, instead of a weight; to a thousandth of the run.
        validation_fraction: Share of the pictures that is never trained on and gives `val/loss`, in [0, 1).
        overrides: What it prepares otherwise than the rest.
    """

    fixed_text: ClassVar[bool] = False

    def __init__(
        self,
        annotations: str,
        images: str,
        questions_per_sample: int = 1,
        follow_links: bool = False,
        weight: float | None = 1.0,
        epochs: float | None = None,
        samples: int | None = None,
        validation_fraction: float = 0.0,
        overrides: Overrides = AS_IN_DATA,
    ) -> None:
        super().__init__(weight, epochs, samples, validation_fraction, overrides)
        if questions_per_sample < 1:
            raise RecipeError(f"data.sources: questions_per_sample is {questions_per_sample}; it must be at least 1.")
        self.annotations = annotations
        self.images = images
        self.questions_per_sample = questions_per_sample
        self.follow_links = follow_links

    def open(self) -> UInt64[np.ndarray, " samples"]:
        """Open the annotations and gather the rows of each picture."""
        self.records = Annotations(self.annotations)
        self.folder = Folder(self.images, self.annotations, self.follow_links)
        names = []
        for index, record in enumerate(self.records):
            if missing := [key for key in ("image", "text", "answer") if not isinstance(record.get(key), str)]:
                raise RecipeError(
                    f"{self.records.where(index)}: {', '.join(missing)} missing or not a text. "
                    "Each line needs image, text and answer."
                )
            names.append(record["image"])
        groups = group_numbers(names)
        order = np.argsort(groups, kind="stable")
        numbers, starts = np.unique(groups[order], return_index=True)
        self.rows_in_order, self.bounds = order, np.append(starts, len(order))  # two arrays: workers share their pages
        return numbers

    def rows(self, index: int) -> Int64[np.ndarray, " rows"]:
        """Rows of the file that ask about one picture."""
        return self.rows_in_order[self.bounds[index] : self.bounds[index + 1]]

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """Questions about one picture, in random order, in one conversation."""
        name, turns, records = self._ask(index, random)
        try:
            return Sample(name, turns, [self.folder.read(records[0]["image"])])
        except BadSample as error:
            raise BadSample(f"{self.where(index)}, id {name}: {error}") from error

    def text(self, index: int, random: np.random.Generator) -> tuple[str, list[Turn], int]:
        """The conversation without its picture."""
        name, turns, _ = self._ask(index, random)
        return name, turns, 1

    def _ask(self, index: int, random: np.random.Generator) -> tuple[str, list[Turn], list[dict[str, Any]]]:
        rows = self.rows(index)
        chosen = random.permutation(rows)[: self.questions_per_sample]
        records = [self.records[int(row)] for row in chosen]
        turns = []
        for number, record in enumerate(records):
            turns += [Turn("user", record["text"] if number else f"<image>\n{record['text']}"), Turn("assistant", record["answer"])]
        return str(self.records[int(rows[0])].get("question_id", rows[0])), turns, records

    def where(self, index: int) -> str:
        """File and line of the first question about the picture."""
        return self.records.where(int(self.rows(index)[0]))

    def estimate(self, indices: Int64[np.ndarray, " samples"], tokens_per_image: int) -> Int64[np.ndarray, " samples"]:
        """Estimated from the number of questions and the size of the first."""
        starts = self.bounds[indices]
        asked = np.minimum(self.bounds[indices + 1] - starts, self.questions_per_sample)
        return tokens_per_image + asked * self.records.sizes(self.rows_in_order[starts]) // BYTES_PER_TOKEN

    def describe(self) -> str:
        """File and folder."""
        return f"{self.annotations} with pictures in {self.images}"

    def fingerprint(self) -> str:
        """The file, and questions in a sample."""
        return f"{file_fingerprint(self.records)}:{self.questions_per_sample}"
