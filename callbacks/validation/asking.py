"""Questions asked of the model in training, on all ranks: who asks which, with which pictures, and where the answers meet."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from callbacks.guards.preemption import end_if_told
from components import phases
from components.batch import Document, SampleFormat
from components.benchmarks import Benchmark, Question
from components.data import Preparation, Sample
from components.errors import RecipeError
from components.turns import Turn

_SEED = 0  # the same pictures are exchanged at every step


def ask(
    trainer: Trainer,
    model: LightningModule,
    benchmark: Benchmark,
    questions: list[Question],
    batch_size: int,
    max_new_tokens: int,
    title: str,
    keep: Callable[[dict[str, str]], None] = lambda answers: None,
) -> dict[str, str]:
    """Questions in, this rank's answers by id out. Called on all ranks, which generate in lockstep.

    Args:
        trainer: The trainer of the run; its data say how questions become prompts.
        model: The model, in any mode; it is in the same mode afterwards.
        benchmark: Where the pictures are read.
        questions: All questions, the same on every rank.
        batch_size: Prompts that a rank answers together, >= 1.
        max_new_tokens: Longest answer, in tokens, >= 1.
        title: Of the progress bar.
        keep: Called with the answers of every batch of this rank.

    Raises:
        RecipeError: A question cannot be asked; on all ranks, whichever of them has met it.
        Preempted: A training run was told to end; on all ranks, once the step that it has reached is saved.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    batches = share(questions, trainer.global_rank, trainer.world_size, batch_size)
    loader = DataLoader(
        Prompts(batches, benchmark, data.preparation, data.tokenizer, data.layout),
        batch_size=None,
        num_workers=data.num_workers,
        generator=torch.Generator(),  # else the loader would draw from the generator that training draws from
    )
    options = {"max_new_tokens": max_new_tokens, "end_token_id": data.preparation.end_token_id(data.tokenizer)}
    quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None or not batches
    answers: dict[str, str] = {}
    with evaluation_mode(model), trainer.precision_plugin.val_step_context():
        for documents in tqdm(loader, desc=title, unit="batch", leave=False, disable=quiet):
            phases.get_on()
            end_if_told(trainer)
            raise_together(trainer, documents if isinstance(documents, RecipeError) else None)
            texts = model.generate(documents, **options)  # type: ignore[operator]
            new = {document.sample_id: text for document, text in zip(documents, texts, strict=True)}
            keep(new)
            answers |= new
    return answers


def gather(trainer: Trainer, answers: dict[str, str]) -> dict[str, str]:
    """The answers of all ranks on the first, where a question asked twice counts once; nothing on the others."""
    if trainer.world_size == 1:
        return answers
    gathered: list[dict[str, str]] | None = [{}] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(answers, gathered)
    return {question_id: answer for of_rank in reversed(gathered or []) for question_id, answer in of_rank.items()}


def raise_together(trainer: Trainer, error: RecipeError | None) -> None:
    """An error of one rank is raised on all of them: a rank that left alone would leave the others waiting."""
    if trainer.strategy.reduce_boolean_decision(error is None, all=True):
        return
    met: list[RecipeError | None] = [error] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(met, error)
    raise next(error for error in met if error is not None)


def share(questions: list[Question], rank: int, ranks: int, batch_size: int) -> list[list[Question]]:
    """The batches of one rank: as many and as large on every rank, for which some questions are repeated.

    Questions about the same pictures follow one another, since what their prompts have in common is computed once a batch. The
    longest prompts come first.
    """
    longest: dict[tuple[str, ...], int] = {}
    for question in questions:
        longest[question.images] = max(longest.get(question.images, 0), len(question.prompt))
    ordered = sorted(questions, key=lambda q: (-len(q.images), -longest[q.images], q.images, -len(q.prompt), q.id))
    batches = []
    for first in range(0, len(ordered), ranks * batch_size):
        at_once = ordered[first : first + ranks * batch_size]
        each = -(-len(at_once) // ranks)
        filled = itertools.chain(at_once, itertools.cycle(ordered))
        batches.append(list(itertools.islice(filled, rank * each, (rank + 1) * each)))
    return batches


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
    """Numbers of batches in, tokenized prompts with their decoded pictures out, or the error that prevents it."""

    batches: list[list[Question]]
    benchmark: Benchmark
    preparation: Preparation
    tokenizer: PreTrainedTokenizerBase
    layout: SampleFormat

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[Document] | RecipeError:
        documents: list[Document] = []
        decoded: dict[tuple[str, ...], tuple[list[bytes], np.ndarray | None]] = {}  # pictures asked about twice are read once
        for question in self.batches[number]:
            try:
                if question.images not in decoded:
                    decoded[question.images] = [self.benchmark.read_image(name) for name in question.images], None
                images, pixels = decoded[question.images]
                sample = Sample(question.id, [Turn("user", question.prompt)], images)
                documents.append(self.preparation.prompt(sample, self.tokenizer, self.layout, pixels))
                decoded[question.images] = images, documents[-1].pixels
            except RecipeError as error:  # handed over, not raised: an exception in a worker loses its words in a traceback
                pictures = f" with picture {', '.join(question.images)}" if question.images else ""
                return RecipeError(f"{self.benchmark.describe()}, question {question.id}{pictures}: {error}")
        return documents


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
