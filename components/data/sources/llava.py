"""LLaVA conversation files: JSON or JSONL with pictures in a folder."""

import numpy as np
from jaxtyping import Int64, UInt64

from components.annotations import Annotations
from components.data.sources.base import AS_IN_DATA, BYTES_PER_TOKEN, Overrides, Sample, Source, file_fingerprint, group_numbers
from components.data.sources.folder import Folder
from components.errors import BadSample
from components.turns import Turn, parse_llava


class LlavaConversations(Source):
    """LLaVA conversation files in, samples out: JSON or JSONL with `id`, `image` and `conversations`.

    A record has one picture, several or none, and any number of turns.

    Args:
        annotations: The JSON or JSONL file.
        images: Folder that picture names are relative to.
        follow_links: Whether links inside that folder may lead out of it.
        weight: Relative weight in the mixture, >= 0; 0 is not drawn before `data.weight_changes` says so. Null where `epochs` or
            `samples` says how much is drawn.
        epochs: How often a run draws each of its samples, > 0, instead of a weight; to a thousandth of the run.
        samples: How many samples a run draws from it, >= 1, instead of a weight; to a thousandth of the run.
        validation_fraction: Share of the pictures that is never trained on and gives `val/loss`, in [0, 1).
        overrides: What it prepares otherwise than the rest.

    Source: https://github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md.
    """

    def __init__(
        self,
        annotations: str,
        images: str,
        follow_links: bool = False,
        weight: float | None = 1.0,
        epochs: float | None = None,
        samples: int | None = None,
        validation_fraction: float = 0.0,
        overrides: Overrides = AS_IN_DATA,
    ) -> None:
        super().__init__(weight, epochs, samples, validation_fraction, overrides)
        self.annotations = annotations
        self.images = images
        self.follow_links = follow_links

    def open(self) -> UInt64[np.ndarray, " samples"]:
        """Open the annotations; samples of one picture belong together."""
        self.records = Annotations(self.annotations)
        self.folder = Folder(self.images, self.annotations, self.follow_links)
        if not self.validation_fraction:
            return np.arange(len(self.records), dtype=np.uint64)
        return group_numbers(self._group(index) for index in range(len(self.records)))

    def _group(self, index: int) -> str:
        """What samples of one picture have in common; a record that cannot be read stands alone."""
        try:
            record = self.records[index]
        except BadSample:
            return str(index)
        return str(record.get("image") or record.get("id", index))

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """The conversation at a place in the file."""
        name, turns, images = self._parse(index)
        try:
            return Sample(name, turns, [self.folder.read(image) for image in images])
        except BadSample as error:
            raise BadSample(f"{self.where(index)}, id {name}: {error}") from error

    def text(self, index: int, random: np.random.Generator) -> tuple[str, list[Turn], int]:
        """The conversation at a place in the file, without its pictures."""
        name, turns, images = self._parse(index)
        return name, turns, len(images)

    def _parse(self, index: int) -> tuple[str, list[Turn], list[str]]:
        record = self.records[index]
        name = str(record.get("id", index))
        try:
            return name, *parse_llava(record)
        except BadSample as error:
            raise BadSample(f"{self.where(index)}, id {name}: {error}") from error

    def where(self, index: int) -> str:
        """File and line."""
        return self.records.where(index)

    def estimate(self, indices: Int64[np.ndarray, " samples"], tokens_per_image: int) -> Int64[np.ndarray, " samples"]:
        """Estimated from the sizes of the records."""
        return tokens_per_image + self.records.sizes(indices) // BYTES_PER_TOKEN

    def describe(self) -> str:
        """File and folder."""
        return f"{self.annotations} with pictures in {self.images}"

    def fingerprint(self) -> str:
        """The file."""
        return file_fingerprint(self.records)
