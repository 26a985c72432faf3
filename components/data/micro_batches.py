"""Micro-batches by number: a map-style dataset whose items are packed batches, made whole inside the loader's workers."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from components.batch import IGNORE_INDEX, Batch, Document, SampleFormat, pack
from components.chat_template import resolve_template
from components.conversation import encode, encode_prompt
from components.data.order import Mixture, deal
from components.data.sources import Sample, Source
from components.errors import BadSample, RecipeError
from components.images import Decoding, SquareMode, decode, to_square
from components.turns import Turn


@dataclass(frozen=True)
class Preparation:
    """How a sample becomes a document.

    Args:
        template: Name of the conversation template; `chat_template` is the tokenizer's own.
        decoding: `llava` ignores EXIF rotation and drops alpha, `upright` rotates and composites on white.
        image_mode: `pad` to a square with the mean color, `crop` the center, or `squash` both sides.
        max_length: Most tokens of a document; whole turns are dropped from its end to fit.
    """

    template: str
    decoding: Decoding
    image_mode: SquareMode
    max_length: int

    def document(self, sample: Sample, tokenizer: PreTrainedTokenizerBase, layout: SampleFormat) -> Document:
        """Decode the pictures, encode the conversation.

        Raises:
            BadSample: A broken picture, a placeholder mismatch, nothing supervised, or a first turn longer than `max_length`.
        """
        turns = sample.turns
        while True:
            ids, labels = encode(
                turns, len(sample.images), tokenizer, self.template, layout.tokens_per_image, layout.image_token_id
            )
            if len(ids) <= self.max_length:
                break
            turns = turns[: len(turns) - 1 - (turns[-1].role == "assistant")]
            if not turns or sum(turn.text.count("<image>") for turn in turns) != len(sample.images):
                raise BadSample(
                    f"longer than data.max_length = {self.max_length} tokens even without its last turns. Raise max_length."
                )
        return Document(sample.id, ids, labels, self.pixels(sample.images, layout), truncated=len(turns) < len(sample.turns))

    def try_out(self, tokenizer: PreTrainedTokenizerBase, layout: SampleFormat) -> None:
        """A template that does not suit the tokenizer shows here, not in a worker at the first sample.

        Raises:
            RecipeError: Not even a question of one letter can be prepared.
        """
        shortest = Sample("x", [Turn("user", "x"), Turn("assistant", "x")], [])
        try:
            self.document(shortest, tokenizer, layout)
        except RecipeError as error:
            raise RecipeError(f"data.template = {self.template}, even for a question of one letter: {error}") from error

    def prompt(self, sample: Sample, tokenizer: PreTrainedTokenizerBase, layout: SampleFormat) -> Document:
        """A question as a document that ends where the answer begins; nothing in it is supervised.

        Raises:
            BadSample: A broken picture or a placeholder mismatch.
        """
        ids = encode_prompt(
            sample.turns, len(sample.images), tokenizer, self.template, layout.tokens_per_image, layout.image_token_id
        )
        return Document(sample.id, ids, np.full_like(ids, IGNORE_INDEX), self.pixels(sample.images, layout))

    def end_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Id of the token that ends an answer; the tokenizer's end token where the template has none.

        Raises:
            RecipeError: The template does not suit the tokenizer, or neither of them has an end token.
        """
        end = resolve_template(self.template, tokenizer).end_token(tokenizer) or tokenizer.eos_token
        if end is None:
            raise RecipeError(f"Template {self.template} has no end token and this tokenizer no eos_token: no answer would end.")
        number = tokenizer.convert_tokens_to_ids(end)
        assert isinstance(number, int)
        return number

    def pixels(self, images: list[bytes], layout: SampleFormat) -> np.ndarray:
        """Decoded square pictures, uint8 [images, 3, size, size]."""
        pixels = np.empty((len(images), 3, layout.image_size, layout.image_size), dtype=np.uint8)
        for number, image in enumerate(images):
            pixels[number] = to_square(decode(image, self.decoding), layout.image_size, self.image_mode, layout.image_mean)
        return pixels


def null_document(layout: SampleFormat, tokenizer: PreTrainedTokenizerBase, sample_id: str) -> Document:
    """A document of one token, without pictures and with nothing supervised: takes the place of a sample that cannot be used."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Document(
        sample_id,
        np.array([start], dtype=np.int64),
        np.array([IGNORE_INDEX], dtype=np.int64),
        np.empty((0, 3, layout.image_size, layout.image_size), dtype=np.uint8),
    )


@dataclass
class MicroBatches(Dataset):
    """Numbers of micro-batches in, packed batches out; each is a pure function of its number and of the fields.

    Args:
        sources: The sources, set up.
        preparation: How samples become documents.
        layout: What the model expects.
        tokenizer: The decoder's tokenizer.
        rank: This rank.
        ranks: Number of ranks.
        micro_batches: Micro-batches in an optimizer step.
    """

    sources: list[Source]
    preparation: Preparation
    layout: SampleFormat
    tokenizer: PreTrainedTokenizerBase
    rank: int
    ranks: int
    micro_batches: int

    def batch(self, draws: list[tuple[Source, int, np.random.Generator]]) -> Batch:
        """The packed batch of the given samples; those that cannot be used become null documents."""
        documents, bad = [], []
        for source, index, random in draws:
            try:
                sample = source.sample(index, random)
                try:
                    documents.append(self.preparation.document(sample, self.tokenizer, self.layout))
                except BadSample as error:
                    raise BadSample(f"{source.where(index)}, id {sample.id}: {error}") from error
            except BadSample as error:
                bad.append(str(error))
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

    def __getitem__(self, number: int) -> Batch:
        """The batch of this rank in micro-batch `number` of the run."""
        step, micro_batch = divmod(number, self.micro_batches)
        slots = range(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        draws = [self.mixture.draw(slot) for slot in slots]
        indices = [int(self.sources[draw.source].train_indices[draw.index]) for draw in draws]
        lengths = [
            self.sources[draw.source].length(index, self.layout.tokens_per_image)
            for draw, index in zip(draws, indices, strict=True)
        ]
        mine = deal(lengths, self.ranks, self.micro_batches)[micro_batch][self.rank]
        return self.batch([(self.sources[draws[i].source], indices[i], self.mixture.sample_stream(slots[i])) for i in mine])


@dataclass
class ValidationBatches(MicroBatches):
    """Validation: the held-out samples of one source, the same number of batches on every rank.

    Args:
        batch_size: Samples in a batch.
        seed: Decides what is random inside the samples.
    """

    batch_size: int
    seed: int

    def __len__(self) -> int:
        """Batches of each rank."""
        samples = len(self.sources[0].validation_indices)
        return -(-samples // (self.batch_size * self.ranks))

    def __getitem__(self, number: int) -> Batch:
        """The batch of this rank; past the end of the samples it is one null document, so that ranks stay in step."""
        source = self.sources[0]
        first = (number * self.ranks + self.rank) * self.batch_size
        indices = source.validation_indices[first : first + self.batch_size]
        if not len(indices):
            return pack([null_document(self.layout, self.tokenizer, "padding")], self.layout.image_token_id)
        return self.batch([(source, int(index), np.random.default_rng([self.seed, int(index)])) for index in indices])


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
