"""Which questions are asked, on which rank, with which pictures, and how they become prompts."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from components.batch import Document, SampleFormat
from components.benchmarks import Benchmark, Question
from components.conversation import Turn
from components.data import Preparation, Sample
from components.errors import RecipeError

_SEED = 0  # the same questions are drawn and the same pictures exchanged at every step


def draw_questions(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` of the questions, in their order; the same ones at every step."""
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i] for i in np.sort(np.random.default_rng(_SEED).permutation(len(questions))[:limit])]


def share(questions: list[Question], rank: int, ranks: int, batch_size: int) -> list[list[Question]]:
    """The batches of one rank, longest prompts first: as many and as large on every rank, for which some questions are repeated."""
    ordered = sorted(questions, key=lambda question: (-len(question.prompt), question.id))
    each = -(-len(ordered) // ranks)
    mine = list(itertools.islice(itertools.cycle(ordered), rank, each * ranks, ranks))
    return [mine[first : first + batch_size] for first in range(0, each, batch_size)]


def exchange_pictures(questions: list[Question]) -> list[Question]:
    """The questions, each with pictures of others: every picture is replaced by another, the same wherever it occurs."""
    names = sorted({name for question in questions for name in question.images})
    if len(names) < 2:
        raise RecipeError(f"shuffled_pictures needs at least two different pictures; there are {len(names)}. Turn it off.")
    order = [names[i] for i in np.random.default_rng(_SEED).permutation(len(names))]
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    return [replace(question, images=tuple(other[name] for name in question.images)) for question in questions]


@dataclass
class Prompts(Dataset):
    """Numbers of batches in, tokenized prompts with their pictures out, or the error that prevents it."""

    batches: list[list[Question]]
    benchmark: Benchmark
    preparation: Preparation
    tokenizer: PreTrainedTokenizerBase
    layout: SampleFormat

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[Document] | RecipeError:
        documents = []
        for question in self.batches[number]:
            try:
                images = [self.benchmark.read_image(name) for name in question.images]
                sample = Sample(question.id, [Turn("user", question.prompt)], images)
                documents.append(self.preparation.prompt(sample, self.tokenizer, self.layout))
            except RecipeError as error:  # handed over, not raised: an exception in a worker loses its words in a traceback
                pictures = f" with picture {', '.join(question.images)}" if question.images else ""
                return RecipeError(f"{self.benchmark.describe()}, question {question.id}{pictures}: {error}")
        return documents
