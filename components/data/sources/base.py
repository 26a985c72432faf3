"""Source: where samples come from, how many of them a run draws, and how they differ from the others of a recipe."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from components.annotations import Annotations
from components.data.permutation import mix
from components.errors import RecipeError
from components.image_modes import Decoding, SquareMode
from components.turns import Turn

BYTES_PER_TOKEN = 4
"""Of English text. Lengths only balance the micro-batches: they need not be exact."""
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


@dataclass(frozen=True)
class Overrides:
    """What a source prepares otherwise than the recipe's `data` says; null is as there.

    Args:
        template: Conversation template.
        decoding: `llava` or `upright`.
        image_mode: `pad`, `crop` or `squash`.
    """

    template: str | None = None
    decoding: Decoding | None = None
    image_mode: SquareMode | None = None


AS_IN_DATA = Overrides()


class Source(ABC):
    """Where samples come from, with their share of the mixture.

    Args:
        weight: Relative weight in the mixture, >= 0; 0 is not drawn before `data.weight_changes` says so. Null where `epochs` or
            `samples` says how much is drawn.
        epochs: How often a run draws each of its samples, > 0, instead of a weight; to a thousandth of the run.
        samples: How many samples a run draws from it, >= 1, instead of a weight; to a thousandth of the run.
        validation_fraction: Share of the pictures that is never trained on and gives `val/loss`, in [0, 1).
        overrides: What it prepares otherwise than the rest.
    """

    fixed_text: ClassVar[bool] = True
    """Whether the text of a sample is the same in every epoch, so that its length can be measured once."""

    window: int = 1
    """Shards that are shuffled together."""

    measured: Callable[[Int64[np.ndarray, " samples"]], Int64[np.ndarray, " samples"]] | None = None
    """Indices in, measured lengths out, where the lengths have been measured."""

    def __init__(
        self,
        weight: float | None,
        epochs: float | None,
        samples: int | None,
        validation_fraction: float,
        overrides: Overrides,
    ) -> None:
        amounts = {"weight": weight, "epochs": epochs, "samples": samples}
        stated = {name: amount for name, amount in amounts.items() if amount is not None}
        if len(stated) != 1 or min(stated.values()) < 0 or (weight is None and min(stated.values()) == 0):
            raise RecipeError(
                "data.sources: each source states a weight of at least 0, or epochs or samples above 0, and null for the others; "
                f"one has {', '.join(f'{name}: {amount}' for name, amount in amounts.items())}."
            )
        if not 0 <= validation_fraction < 1:
            raise RecipeError(f"data.sources: validation_fraction {validation_fraction} must be in [0, 1).")
        self.weight, self.epochs, self.samples = weight, epochs, samples
        self.validation_fraction = validation_fraction
        self.overrides = overrides

    def setup(self) -> None:
        """Open the files and split the samples. Called once a process, before the workers start."""
        held_out = uniform(self.open()) < self.validation_fraction
        self._train_indices = np.flatnonzero(~held_out)
        self.validation_indices = np.flatnonzero(held_out)
        self.shard_sizes = np.array([len(self._train_indices)])
        self.check_split(len(held_out))

    def check_split(self, num_samples: int) -> None:
        """Something is left to train on, and something held out where that was asked for.

        Raises:
            RecipeError: It is not so.
        """
        if not self.num_samples:
            raise RecipeError(f"{self.describe()}: no sample is left to train on. Lower validation_fraction.")
        if self.validation_fraction and not len(self.validation_indices):
            raise RecipeError(
                f"{self.describe()}: validation_fraction {self.validation_fraction} holds out none of {num_samples} samples. "
                "Raise it."
            )

    shard_sizes: Int64[np.ndarray, " shards"]
    """Samples to train on in each shard; a source without shards is one shard."""

    validation_indices: Int64[np.ndarray, " held_out"]
    """Indices of the samples that are never trained on."""

    @property
    def num_samples(self) -> int:
        """Samples to train on."""
        return int(self.shard_sizes.sum())

    def train_indices(self, numbers: Int64[np.ndarray, " numbers"]) -> Int64[np.ndarray, " numbers"]:
        """Numbers of samples to train on, counted shard by shard, in; their indices out."""
        return self._train_indices[numbers]

    def open(self) -> UInt64[np.ndarray, " samples"]:
        """Open the files; returns one number for each sample, equal for samples that show the same picture.

        A source whose samples are split elsewhere has a `setup` of its own instead.
        """
        raise NotImplementedError

    @abstractmethod
    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """The sample at an index; `random` decides whatever is random in it.

        Raises:
            BadSample: It cannot be used; the message names file, line and id.
        """

    @abstractmethod
    def text(self, index: int, random: np.random.Generator) -> tuple[str, list[Turn], int]:
        """Id, conversation and number of pictures of the sample at an index; no picture is read.

        Raises:
            BadSample: It cannot be used; the message names file, line and id.
        """

    def lengths(self, indices: Int64[np.ndarray, " samples"], tokens_per_image: int) -> Int64[np.ndarray, " samples"]:
        """How many tokens the samples become: as `python main.py index` has measured, else about."""
        return self.estimate(indices, tokens_per_image) if self.measured is None else self.measured(indices)

    @abstractmethod
    def estimate(self, indices: Int64[np.ndarray, " samples"], tokens_per_image: int) -> Int64[np.ndarray, " samples"]:
        """About how many tokens the samples become, without reading them."""

    def where(self, index: int) -> str:
        """Where the sample at an index stands, for error messages."""
        return f"{self.describe()}, sample {index}"

    @abstractmethod
    def describe(self) -> str:
        """The source in a few words, for start-up and error messages."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the samples or their order change."""


def file_fingerprint(records: Annotations) -> str:
    """File name, size, number of records and a digest of the file's ends."""
    return f"{records.path.name}:{records.size}:{len(records)}:{_digest_of_ends(records.path)}"


def _digest_of_ends(path: Path) -> str:
    """Of the first and the last MiB: notices an edit of equal length there, and costs the same for a file of any size."""
    with path.open("rb") as file:
        first = file.read(_MIB)
        file.seek(max(0, path.stat().st_size - _MIB))
        return hashlib.blake2b(first + file.read(_MIB), digest_size=8).hexdigest()


def group_numbers(names: Iterable[str]) -> UInt64[np.ndarray, " names"]:
    """Names in, one number each out, equal for equal names."""
    digests = (hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def uniform(numbers: UInt64[np.ndarray, " numbers"]) -> Float64[np.ndarray, " numbers"]:
    """Numbers to uniform [0, 1): the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    return mix(numbers + np.uint64(0x9E3779B97F4A7C15)).astype(np.float64) / 2.0**64
