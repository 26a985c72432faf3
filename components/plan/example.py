"""Example: samples of a recipe as the model reads them, its own where data and tokenizer are at hand."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from components.batch import IGNORE_INDEX, Batch, Document, SampleFormat, pack
from components.chat_template import OF_TOKENIZER
from components.data import Preparation, Sample
from components.errors import BadSample
from components.plan.samples import FirstSamples
from components.shapes_world import WORDS, Setting, draw_scene
from components.tokenizer import WordTokenizer
from components.turns import Turn

MAX_DOCUMENTS = 16
"""Documents of a micro-batch that are shown."""
VISUAL, SUPERVISED, CONTEXT = "visual", "supervised", "context"


@dataclass(frozen=True)
class Example:
    """Samples and what becomes of them.

    Args:
        samples: As the data have them; at least one.
        documents: The first documents of a micro-batch; the samples' before the others.
        micro_batch: Documents of the whole micro-batch.
        preparations: How each of the samples was prepared.
        tokenizer: What split the text.
        layout: What the model expects.
        remarks: What of this is not the recipe's own; empty when everything is.
    """

    samples: list[Sample]
    documents: list[Document]
    micro_batch: int
    preparations: list[Preparation]
    tokenizer: PreTrainedTokenizerBase
    layout: SampleFormat
    remarks: list[str]

    @property
    def batch(self) -> Batch:
        """The documents, packed."""
        return pack(self.documents, self.layout.image_token_id)

    def spans(self, document: Document) -> list[tuple[str, int, int]]:
        """A document in, its spans out: what they are to the model, first and one past the last position."""
        supervised = np.where(document.labels != IGNORE_INDEX, SUPERVISED, CONTEXT)
        kinds = np.where(document.input_ids == self.layout.image_token_id, VISUAL, supervised)
        edges = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist(), len(kinds)]
        return [(str(kinds[start]), start, end) for start, end in pairwise(edges)]


def example_of(first: FirstSamples, micro_batch: int, shown: int = 1) -> Example:
    """The first samples of a run and those beside them.

    Where data or tokenizer are not at hand, scenes of ShapesWorld and a tokenizer of its words take their places.

    Args:
        first: What is at hand.
        micro_batch: Samples of a micro-batch, >= 1.
        shown: Samples that are shown one by one, >= 1; a single one has a picture, if any has.

    Raises:
        RecipeError: There is no such template.
    """
    layout = first.layout
    if first.prepared and first.tokenizer is not None:
        ordered = first.prepared
        if shown == 1:
            ordered = sorted(ordered, key=lambda prepared: not prepared.sample.images)
        documents = [prepared.document for prepared in ordered[: max(shown, min(micro_batch, MAX_DOCUMENTS))]]
        samples, preparations = ([getattr(one, part) for one in ordered[:shown]] for part in ("sample", "preparation"))
        return Example(samples, documents, micro_batch, preparations, first.tokenizer, layout, [])
    remarks = []
    tokenizer = first.tokenizer
    sample, preparation = first.any_sample() or (None, first.data.preparation)
    if tokenizer is None:
        remarks.append(f"{first.no_tokenizer}: words of ShapesWorld are one token here, other text one a byte")
        tokenizer = WordTokenizer(list(WORDS)).build()
        if preparation.template == OF_TOKENIZER:
            remarks.append("the template is the tokenizer's own, so the template brief takes its place")
            preparation = replace(preparation, template="brief")
    if sample is not None:
        try:
            document = preparation.document(sample, tokenizer, layout)
            return Example([sample], [document], micro_batch, [preparation], tokenizer, layout, remarks)
        except BadSample:  # many bytes, each a token
            pass
    remarks.insert(0, "no sample of the data is on this machine: the program has drawn a scene")
    drawn = [_scene(number, layout.image_size) for number in range(max(shown, min(micro_batch, MAX_DOCUMENTS)))]
    longer = replace(preparation, max_length=10**6)
    documents = [longer.document(sample, tokenizer, layout) for sample in drawn]
    return Example(drawn[:shown], documents, micro_batch, [preparation] * shown, tokenizer, layout, remarks)


def _scene(number: int, image_size: int) -> Sample:
    scene = draw_scene(Setting(image_size=image_size), np.random.default_rng(number), held_out_pairs=False)
    turns = [Turn("user", "<image>\ndescribe the picture"), Turn("assistant", scene.caption())]
    return Sample(f"scene {number}", turns, [scene.picture()])
