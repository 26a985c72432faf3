"""Samples: what of a recipe's data can be read here, the first samples of its run, and how long they are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from components.batch import IGNORE_INDEX, Document, SampleFormat
from components.data import InstructionData, Preparation, Sample, Source
from components.data.order import Mixture, Shards
from components.data.shares import segments_of
from components.errors import BadSample, RecipeError
from components.plan.assumptions import Assumptions
from components.tokenizer import load_tokenizer

MEASURED = 64
"""Samples that a plan measures."""
MAX_BYTES = 2 * 2**30
"""Largest annotation file that a plan opens: the first pass over a larger one takes longer than a plan should."""


@dataclass(frozen=True)
class Share:
    """What a source contributes to a run.

    Args:
        name: Its name in the recipe.
        description: The source in a few words.
        share: Of the samples of the run, in [0, 1].
        samples: What it has to train on; None where it is not at hand.
        epochs: How often each of them comes by; None where that is not known.
        missing: Why it is not at hand; empty where it is.
    """

    name: str
    description: str
    share: float
    samples: int | None = None
    epochs: float | None = None
    missing: str = ""


@dataclass(frozen=True)
class Lengths:
    """The mean sample.

    Args:
        text_tokens: Tokens of its text, template included.
        supervised_tokens: Tokens that it is trained to say.
        images_per_sample: Pictures.
        origin: Where the numbers come from.
    """

    text_tokens: float
    supervised_tokens: float
    images_per_sample: float
    origin: str


class Prepared(NamedTuple):
    """A sample, what becomes of it, and how."""

    sample: Sample
    document: Document
    preparation: Preparation


@dataclass
class FirstSamples:
    """A recipe's data in, what is at hand of them out; nothing is fetched.

    Args:
        data: The data.
        layout: What the model expects.
        max_steps: Optimizer steps of the run.
    """

    data: InstructionData
    layout: SampleFormat
    max_steps: int
    tokenizer: PreTrainedTokenizerBase | None = field(init=False, default=None)
    no_tokenizer: str = field(init=False, default="")
    shares: list[Share] = field(init=False, default_factory=list)
    prepared: list[Prepared] = field(init=False, default_factory=list)
    bad: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.tokenizer = load_tokenizer(self.layout.tokenizer)
        except RecipeError:
            self.no_tokenizer = f"the tokenizer {self.layout.tokenizer} is not on this machine"
        if self.tokenizer is not None:
            self.data.try_out(self.tokenizer, self.layout)
        data = self.data
        missing = {name: _open(source) for name, source in data.sources.items()}
        # what a source that is not here would draw by its epochs is not known: the same as each of the others
        unknown = self.max_steps * data.global_batch_size // len(data.sources)
        sizes = {
            name: max(1, round(unknown / (source.epochs or 1))) if missing[name] else source.num_samples
            for name, source in data.sources.items()
        }
        shards = [
            Shards(np.array([sizes[name]]) if missing[name] else source.shard_sizes, source.window)
            for name, source in data.sources.items()
        ]
        segments = segments_of(data.sources, sizes, data.weight_changes, self.max_steps, data.global_batch_size)
        self._mixture = Mixture(shards, segments, data.seed)
        drawn = self._mixture.drawn(self.max_steps * data.global_batch_size)
        for (name, source), count in zip(data.sources.items(), drawn.tolist(), strict=True):
            samples, epochs = (None, None) if missing[name] else (sizes[name], count / sizes[name])
            self.shares.append(Share(name, source.describe(), count / int(drawn.sum()), samples, epochs, missing[name]))

    @property
    def complete(self) -> bool:
        """Whether every source and the tokenizer are at hand."""
        return self.tokenizer is not None and not any(share.missing for share in self.shares)

    def prepare(self, count: int = MEASURED) -> None:
        """The first `count` samples of the run become documents, as training makes them. Needs all of the data."""
        assert self.tokenizer is not None
        sources = list(self.data.sources.values())
        draws = self._mixture.draws(np.arange(count))
        for slot in range(count):
            source = sources[draws.source[slot]]
            index = int(source.train_indices(draws.number[slot : slot + 1])[0])
            preparation = self.data.preparation.overridden(source.overrides)
            try:
                sample = source.sample(index, self._mixture.sample_stream(slot))
                document = preparation.document(sample, self.tokenizer, self.layout)
                self.prepared.append(Prepared(sample, document, preparation))
            except BadSample as error:
                self.bad.append(f"{source.where(index)}: {error}")

    def any_sample(self) -> tuple[Sample, Preparation] | None:
        """The first usable sample of a source that is at hand, and how that is prepared; it needs no tokenizer."""
        for share, source in zip(self.shares, self.data.sources.values(), strict=True):
            for index in [] if share.missing else source.train_indices(np.arange(min(MEASURED, source.num_samples))):
                try:
                    sample = source.sample(int(index), np.random.default_rng(self.data.seed))
                except BadSample:
                    continue
                return sample, self.data.preparation.overridden(source.overrides)
        return None

    def lengths(self, stated: Assumptions) -> Lengths | None:
        """The mean sample as the recipe states it, else as measured, else None.

        Args:
            stated: The recipe's section `plan`.
        """
        text = stated.text_tokens
        if text is not None:
            supervised = text if stated.supervised_tokens is None else stated.supervised_tokens
            images = 1.0 if stated.images_per_sample is None else stated.images_per_sample
            return Lengths(text, supervised, images, "as the section plan states it")
        return self.measured()

    def measured(self) -> Lengths | None:
        """The mean of the samples that were prepared, or None."""
        if not self.prepared:
            return None
        documents = [prepared.document for prepared in self.prepared]
        slots = [int((document.input_ids == self.layout.image_token_id).sum()) for document in documents]
        return Lengths(
            float(np.mean([len(document.input_ids) - visual for document, visual in zip(documents, slots, strict=True)])),
            float(np.mean([(document.labels != IGNORE_INDEX).sum() for document in documents])),
            float(np.mean([len(document.pixels) for document in documents])),
            f"mean of the first {len(documents)} samples",
        )


def _open(source: Source) -> str:
    """Set up a source; why that is not possible here, or nothing."""
    annotations = Path(getattr(source, "annotations", ""))
    if annotations.is_file() and annotations.stat().st_size > MAX_BYTES:
        return f"{annotations} has {annotations.stat().st_size / 2**30:.0f} GiB: too large to open for a plan"
    try:
        source.setup()
    except RecipeError as error:
        return str(error)
    return ""
