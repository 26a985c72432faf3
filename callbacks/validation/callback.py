"""When benchmarks are asked while a model trains and afterwards, and where their answers go."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from tqdm import tqdm

from callbacks.validation.questions import Prompts, draw_questions, exchange_pictures, share
from callbacks.validation.result import Result, answer_sheet
from components.benchmarks import Benchmark, Question, text_only_best
from components.errors import RecipeError

_PACKAGES = ("torch", "transformers", "lightning", "numpy", "pillow")


class Validation(Callback):
    """Benchmarks in, accuracies in the log, tables on the console and answers in the run folder's `validation/` out.

    Args:
        benchmarks: Name of each benchmark and the benchmark; the name stands in `NAME/accuracy` and in file names.
        every_n_steps: Optimizer steps between validations while training, >= 1, or null.
        at_end: Whether to validate when training reaches trainer.max_steps.
        limit: Most questions of each benchmark while training, >= 1, or null for all; names then end in `_partial`. The validate
            command always asks all.
        batch_size: Prompts that each rank answers together, >= 1.
        max_new_tokens: Longest answer, in tokens, >= 1.
        shuffled_pictures: Whether to ask once more with the pictures exchanged, at the end of training and in the validate command: a
            model that looks at them falls to the text-only best.
        num_pictures: Pictures shown with question and answers in TensorBoard, >= 0.

    Raises:
        RecipeError: A value out of range, or a benchmark that cannot be opened.
    """

    def __init__(
        self,
        benchmarks: dict[str, Benchmark],
        every_n_steps: int | None = None,
        at_end: bool = True,
        limit: int | None = None,
        batch_size: int = 64,
        max_new_tokens: int = 16,
        shuffled_pictures: bool = False,
        num_pictures: int = 16,
    ) -> None:
        numbers = {"every_n_steps": every_n_steps, "limit": limit, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
        if wrong := {name: number for name, number in numbers.items() if number is not None and number < 1}:
            raise RecipeError(f"validation: {wrong} must be at least 1.")
        if num_pictures < 0:
            raise RecipeError(f"validation: num_pictures = {num_pictures} must be at least 0.")
        self.benchmarks = benchmarks
        self.every_n_steps = every_n_steps
        self.at_end = at_end
        self.limit = limit
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.shuffled_pictures = shuffled_pictures
        self.num_pictures = num_pictures
        self.loaded_step = 0
        self.validated = False

    # --- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the benchmarks: what is missing shows before anything is trained."""
        for name, benchmark in self.benchmarks.items():
            try:
                benchmark.setup()
                if self.shuffled_pictures:
                    exchange_pictures(benchmark.questions())
            except RecipeError as error:
                raise RecipeError(f"validation.benchmarks.{name}: {error}") from error

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the step of the weights: the validate command does not restore the trainer's."""
        self.loaded_step = checkpoint["global_step"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Validate when it is due, and only between optimizer steps."""
        if self.every_n_steps is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        left_to_the_end = self.at_end and trainer.global_step >= trainer.max_steps
        if trainer.global_step % self.every_n_steps == 0 and not left_to_the_end:
            self.validate(trainer, pl_module, trainer.global_step, self.limit, self.shuffled_pictures and not self.at_end)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate a finished run. One that was interrupted has a checkpoint to write, and goes on later."""
        if self.at_end and trainer.global_step >= trainer.max_steps:
            self.validate(trainer, pl_module, trainer.global_step, self.limit, self.shuffled_pictures)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validate command."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.validated = True
            self.validate(trainer, pl_module, self.loaded_step, None, self.shuffled_pictures)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The validate command where no source holds samples out: Lightning's loop has no batch and calls no hook but this."""
        if stage == TrainerFn.VALIDATING and not self.validated:
            pl_module.to(trainer.strategy.root_device)
            self.validate(trainer, pl_module, self.loaded_step, None, self.shuffled_pictures)
            pl_module.cpu()
        self.validated = False

    # --- what

    def validate(self, trainer: Trainer, pl_module: LightningModule, step: int, limit: int | None, shuffled_pictures: bool) -> None:
        """Ask the questions of every benchmark, score, show and keep the answers. Called on all ranks."""
        folder = Path(trainer.log_dir or ".") / "validation"  # log_dir talks to all ranks
        for name, benchmark in self.benchmarks.items():
            questions = draw_questions(benchmark.questions(), limit)
            exchanged = exchange_pictures(questions) if shuffled_pictures else []
            answers = self._answers(trainer, pl_module, name, benchmark, questions)
            other_answers = self._answers(trainer, pl_module, f"{name}, exchanged pictures", benchmark, exchanged)
            partial = len(questions) < len(benchmark.questions())
            result = Result(
                name=f"{name}_partial" if partial else name,
                title=f"{benchmark.describe()}{f'; {len(questions)} of its questions' if partial else ''}",
                step=step,
                counts=Counter(key for question in questions for key in _accuracy_names(question)),
                metrics=benchmark.score(answers),
                text_only=text_only_best(questions),
                shuffled=benchmark.score(other_answers) if other_answers else {},
            )
            trainer.callback_metrics.update({f"{result.name}/{key}": torch.tensor(value) for key, value in result.metrics.items()})
            if not trainer.is_global_zero:
                continue
            logged = {f"{result.name}/{key}": value for key, value in result.metrics.items()}
            if result.shuffled:
                logged[f"{result.name}/accuracy_shuffled_pictures"] = result.shuffled["accuracy"]
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=step)
            tqdm.write(result.table())
            shown = [question for question in draw_questions(questions, self.num_pictures) if question.images]
            writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
            for writer in writers if shown else []:
                writer.add_image(f"{result.name}/answers", answer_sheet(benchmark, shown, answers), step, dataformats="HWC")
            provenance = {
                "partial": partial,
                "all_questions": len(benchmark.questions()),
                "benchmark": benchmark.describe(),
                "fingerprint": benchmark.fingerprint(),
                "prompts": _digest(trainer.datamodule.preparation.template, *(question.prompt for question in questions)),
                "max_new_tokens": self.max_new_tokens,
                "versions": {package: version(package) for package in _PACKAGES},
            }
            rows = [_row(question, answers) for question in questions]
            for row, question in zip(rows, exchanged, strict=False):
                row |= {"shuffled_images": question.images, "shuffled_answer": other_answers[question.id]}
            result.write(folder, provenance, rows)

    def _answers(
        self, trainer: Trainer, pl_module: LightningModule, name: str, benchmark: Benchmark, questions: list[Question]
    ) -> dict[str, str]:
        """The model's answer to every question, by id, on every rank."""
        data = trainer.datamodule
        batches = share(questions, trainer.global_rank, trainer.world_size, self.batch_size)
        loader = DataLoader(
            Prompts(batches, benchmark, data.preparation, data.tokenizer, data.layout),
            batch_size=None,
            num_workers=data.num_workers,
            generator=torch.Generator(),  # else the loader draws from the generator that training draws from
        )
        quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None or not batches
        answers: dict[str, str] = {}
        with evaluation_mode(pl_module), trainer.precision_plugin.val_step_context():
            for documents in tqdm(loader, desc=name, unit="batch", leave=False, disable=quiet):
                if isinstance(documents, RecipeError):
                    raise documents
                texts = pl_module.generate(documents, max_new_tokens=self.max_new_tokens)
                answers |= {document.sample_id: text for document, text in zip(documents, texts, strict=True)}
        if trainer.world_size == 1:
            return answers
        gathered: list[dict[str, str]] = [{}] * trainer.world_size
        torch.distributed.all_gather_object(gathered, answers)
        return {name: answer for share in gathered for name, answer in share.items()}  # questions asked twice collapse


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


def _accuracy_names(question: Question) -> list[str]:
    return ["accuracy", f"accuracy/{question.group}"] if question.group else ["accuracy"]


def _row(question: Question, answers: dict[str, str]) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "images": question.images,
        "prompt": question.prompt,
        "group": question.group,
        "reference": question.reference,
        "answer": answers[question.id],
    }


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(errors="surrogatepass"), digest_size=16).hexdigest()
