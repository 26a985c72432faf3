"""Micro-batches by number: a map-style dataset whose items are packed batches, made whole inside the loader's workers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from components.batch import Batch, SampleFormat, pack
from components.data.order import Mixture, deal
from components.data.preparation import Preparation, null_document
from components.data.sources import Source
from components.errors import BadSample, RecipeError


@dataclass
class MicroBatches(Dataset, ABC):
    """Numbers of micro-batches in, packed batches out; each is a pure function of its number and of the fields.

    Args:
        sources: The sources by name, set up.
        preparation: How samples become documents, where a source does not have its own way.
        layout: What the model expects.
        tokenizer: The decoder's tokenizer.
        rank: This rank.
        ranks: Number of ranks.
        micro_batches: Micro-batches in an optimizer step.
    """

    sources: dict[str, Source]
    preparation: Preparation
    layout: SampleFormat
    tokenizer: PreTrainedTokenizerBase
    rank: int
    ranks: int
    micro_batches: int

    def __getitem__(self, number: int) -> Batch | RecipeError:
        """The batch of this rank by its number, or the error that ends the run."""
        try:
            return self.make(number)
        except RecipeError as error:  # handed over, not raised: an exception in a worker loses its words in a traceback
            return error

    @abstractmethod
    def make(self, number: int) -> Batch:
        """The batch of this rank by its number.

        Raises:
            RecipeError: Data cannot be read, through no fault of one sample.
        """

    def batch(self, draws: list[tuple[str, int, np.random.Generator]]) -> Batch:
        """The packed batch of the given samples (name of the source, index, randomness); unusable ones become null documents."""
        documents, bad = [], []
        preparations = {name: self.preparation.overridden(source.overrides) for name, source in self.sources.items()}
        for name, index, random in draws:
            source = self.sources[name]
            try:
                sample = source.sample(index, random)
                try:
                    documents.append(preparations[name].document(sample, self.tokenizer, self.layout))
                except BadSample as error:
                    raise BadSample(f"{source.where(index)}, id {sample.id}: {error}") from error
            except BadSample as error:
                bad.append((name, str(error)))
                documents.append(null_document(self.layout, self.tokenizer, f"null of {source.describe()} {index}"))
        return pack(documents, self.layout.image_token_id, bad)


@dataclass
class TrainBatches(MicroBatches):
    """Training: micro-batch m of optimizer step k holds its share of the slots [kG, (k+1)G).

    Args:
        mixture: The order of the samples.
        global_batch_size: Samples in an optimizer step.
    """

    mixture: Mixture
    global_batch_size: int
    _dealt: tuple[int, list[tuple[str, int]], list[list[list[int]]]] | None = field(default=None, init=False, repr=False)

    def make(self, number: int) -> Batch:
        """The batch of this rank in micro-batch `number` of the run."""
        step, micro_batch = divmod(number, self.micro_batches)
        samples, hands = self.deal_step(step)
        first = step * self.global_batch_size
        return self.batch([(*samples[i], self.mixture.sample_stream(first + i)) for i in hands[micro_batch][self.rank]])

    def deal_step(self, step: int) -> tuple[list[tuple[str, int]], list[list[list[int]]]]:
        """The samples of an optimizer step, and which of them each micro-batch and rank has: the same on every rank.

        The last step is kept, since a worker makes several micro-batches of it.
        """
        if self._dealt is None or self._dealt[0] != step:
            slots = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
            draws = self.mixture.draws(slots)
            indices, lengths = np.empty_like(slots), np.empty_like(slots)
            for number, source in enumerate(self.sources.values()):
                here = draws.source == number
                if here.any():
                    indices[here] = source.train_indices(draws.number[here])
                    lengths[here] = source.lengths(indices[here], self.layout.tokens_per_image)
            names = list(self.sources)
            samples = [(names[source], index) for source, index in zip(draws.source.tolist(), indices.tolist(), strict=True)]
            self._dealt = (step, samples, deal(lengths.tolist(), self.ranks, self.micro_batches))
        return self._dealt[1], self._dealt[2]


@dataclass
class ValidationBatches(MicroBatches):
    """Validation: the held-out samples of one source, the same number of batches on every rank.

    Args:
        batch_size: Samples in a batch.
        seed: Decides what is random inside the samples.
    """

    batch_size: int
    seed: int

    @property
    def _source(self) -> Source:
        (source,) = self.sources.values()
        return source

    def __len__(self) -> int:
        """Batches of each rank."""
        samples = len(self._source.validation_indices)
        return -(-samples // (self.batch_size * self.ranks))

    def make(self, number: int) -> Batch:
        """The batch of this rank; past the end of the samples it is one null document, so that ranks stay in step."""
        source = self._source
        first = (number * self.ranks + self.rank) * self.batch_size
        indices = source.validation_indices[first : first + self.batch_size]
        (name,) = self.sources
        if not len(indices):
            return pack([null_document(self.layout, self.tokenizer, "padding")], self.layout.image_token_id)
        return self.batch([(name, int(index), np.random.default_rng([self.seed, int(index)])) for index in indices])


@dataclass
class FromStep(Sampler):
    """Numbers of the micro-batches of a run, from an optimizer step on.

    Args:
        first_step: Optimizer steps already taken.
        max_steps: Optimizer steps of the whole run.
        micro_batches: Micro-batches in an optimizer step.
    """

    first_step: int
    max_steps: int
    micro_batches: int

    def __len__(self) -> int:
        """Of the whole run: Lightning counts from its beginning, also after a resume."""
        return self.max_steps * self.micro_batches

    def __iter__(self) -> Iterator[int]:
        """Only what is left."""
        return iter(range(self.first_step * self.micro_batches, len(self)))
