"""Tar shards of pictures and captions, as img2dataset and webdataset write them."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from components.chat_template import IMAGE_PLACEHOLDER
from components.data.filters import NO_FILTERS, Filters, Selection, open_selection
from components.data.sources.base import AS_IN_DATA, BYTES_PER_TOKEN, Overrides, Sample, Source
from components.errors import BadSample, RecipeError
from components.shards.names import expand_all
from components.shards.rows import ShardIndex
from components.shards.sample import read_caption, read_sample
from components.shards.storage import Storage
from components.turns import Turn

T = TypeVar("T")
COMMAND = "python main.py index --config RECIPE"


class TarShards(Source):
    """Tar shards in, pairs of a picture and its caption out.

    Needs the index that `python main.py index --config RECIPE` makes. Captions teach with the template `plain`, which asks nothing.

    Args:
        shards: The shards: paths or urls (s3://, gs://, https://) with `{00000..00331}`, `{a,b}`, or `*` on this machine.
        index: Folder of their index.
        window: Shards that are shuffled together, >= 1. Each worker process reads so many at a time.
        filters: Which samples are used.
        weight: Relative weight in the mixture, >= 0; 0 is not drawn before `data.weight_changes` says so. Null where `epochs` or
            `samples` says how much is drawn.
        epochs: How often a run draws each of its samples, > 0, instead of a weight; to a thousandth of the run.
        samples: How many samples a run draws from it, >= 1, instead of a weight; to a thousandth of the run.
        validation_fraction: Share of the pairs that is never trained on and gives `val/loss`, in [0, 1).
        overrides: What it prepares otherwise than the rest.

    Source: https://github.com/rom1504/img2dataset, https://github.com/webdataset/webdataset.
    """

    def __init__(
        self,
        shards: str | list[str],
        index: str,
        window: int = 64,
        filters: Filters = NO_FILTERS,
        weight: float | None = 1.0,
        epochs: float | None = None,
        samples: int | None = None,
        validation_fraction: float = 0.0,
        overrides: Overrides = AS_IN_DATA,
    ) -> None:
        super().__init__(weight, epochs, samples, validation_fraction, overrides)
        if window < 1:
            raise RecipeError(f"data.sources: window {window} must be at least 1.")
        self.shards = [shards] if isinstance(shards, str) else shards
        self.index = index
        self.window = window
        self.filters = filters

    @property
    def selects(self) -> bool:
        """Whether some samples are not trained on, which the index command has to decide."""
        return self.filters.any or self.validation_fraction > 0

    def open_index(self) -> None:
        """Open the index alone.

        Raises:
            RecipeError: There is none of these shards.
        """
        self.rows_of = ShardIndex.open(self.index, expand_all(self.shards), self.shards)
        self.storage = Storage(max_open=max(64, self.window))
        self.starts = np.concatenate([[0], np.cumsum(self.rows_of.sizes)])

    def setup(self) -> None:
        """Open the index and what was decided by the filters."""
        self.open_index()
        self.selection: Selection | None = None
        self.shard_sizes, self.validation_indices = self.rows_of.sizes, np.empty(0, dtype=np.int64)
        if self.selects:
            self.selection = open_selection(self.rows_of, self.filters, self.validation_fraction)
            if self.selection is None:
                raise RecipeError(
                    f"{self.index} does not say yet which samples these filters and validation_fraction "
                    f"{self.validation_fraction} leave. Run {COMMAND}."
                )
            self.shard_sizes, self.validation_indices = self.selection.train, self.selection.held_out
        self.train_starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self.check_split(int(self.starts[-1]))

    def train_indices(self, numbers: Int64[np.ndarray, " numbers"]) -> Int64[np.ndarray, " numbers"]:
        """Numbers of samples to train on, counted shard by shard, in; their indices out."""
        if self.selection is None:
            return numbers
        indices = np.empty_like(numbers)
        for shard, places, members in by_shard(numbers, self.train_starts):
            indices[places] = self.starts[shard] + self.selection.rows_to_train_on(shard)[members]
        return indices

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """The pair at an index."""
        shard, member = self._find(index)
        pair = self._read(read_sample, shard, member)
        return Sample(pair.key, _turns(pair.caption), [pair.image])

    def text(self, index: int, random: np.random.Generator) -> tuple[str, list[Turn], int]:
        """The caption at an index, without its picture; instead of its key, which would take another read, its place."""
        return self.where(index), _turns(self._read(read_caption, *self._find(index))), 1

    def estimate(self, indices: Int64[np.ndarray, " samples"], tokens_per_image: int) -> Int64[np.ndarray, " samples"]:
        """Estimated from the characters of the captions."""
        characters = np.empty_like(indices)
        for shard, places, members in by_shard(indices, self.starts):
            characters[places] = self.rows_of.rows(shard)["characters"][members]
        return tokens_per_image + characters // BYTES_PER_TOKEN

    def where(self, index: int) -> str:
        """Shard and place in it."""
        shard, member = self._find(index)
        return f"{self.rows_of.names[shard]}, sample {member}"

    def describe(self) -> str:
        """The shards."""
        return " and ".join(self.shards)

    def fingerprint(self) -> str:
        """Of the index, and of what decided which samples are used."""
        decided = self.selection.files.hash if self.selection else "all"
        return f"{self.rows_of.fingerprint}:{decided}"

    def _read(self, read: Callable[[Storage, str, np.void], T], shard: int, member: int) -> T:
        try:
            return read(self.storage, self.rows_of.names[shard], self.rows_of.rows(shard)[member])
        except BadSample as error:
            self.rows_of.check_version(shard, self.storage)  # no fault of the sample: another audit mends it
            raise BadSample(f"{self.rows_of.names[shard]}, sample {member}: {error}") from error

    def _find(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])


def _turns(caption: str) -> list[Turn]:
    """As LLaVA's pretraining has them: no question is asked."""
    return [Turn("user", IMAGE_PLACEHOLDER), Turn("assistant", caption)]


def by_shard(
    numbers: Int64[np.ndarray, " numbers"], starts: Int64[np.ndarray, " edges"]
) -> Iterator[tuple[int, Int64[np.ndarray, " some"], Int64[np.ndarray, " some"]]]:
    """Each shard that some of the numbers lie in, the places of those, and their numbers inside the shard."""
    shards = np.searchsorted(starts, numbers, side="right") - 1
    for shard in np.unique(shards):
        places = np.flatnonzero(shards == shard)
        yield int(shard), places, numbers[places] - starts[shard]
