"""When benchmarks are asked while a model trains and afterwards, and where their answers go."""

from collections.abc import Iterator
from contextlib import contextmanager
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
from components.benchmarks import Benchmark, Question
from components.errors import RecipeError
from components.run_folder import RECIPE


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
        shuffled_pictures: Whether to ask once more with the pictures exchanged, at the end of training and in the validate command:
            a model that looks at them falls to the text-only best or below.
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
                    exchange_pictures(draw_questions(benchmark.questions(), self.limit))
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
        """Ask the questions of every benchmark; score, show and keep the answers. Called on all ranks."""
        run = Path(trainer.log_dir or ".")  # log_dir talks to all ranks
        validated = trainer.ckpt_path if trainer.state.fn == TrainerFn.VALIDATING else None
        recipe = (Path(validated).parent if validated else run) / RECIPE
        preparation = trainer.datamodule.preparation  # type: ignore[attr-defined]
        for name, benchmark in self.benchmarks.items():
            asked = draw_questions(benchmark.questions(), limit)
            answers = self._answers(trainer, pl_module, name, benchmark, asked)
            exchanged = exchange_pictures(asked) if shuffled_pictures else None
            others = self._answers(trainer, pl_module, f"{name}, exchanged pictures", benchmark, exchanged) if exchanged else None
            result = Result(name, step, benchmark, asked, answers, exchanged, others)
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in result.logged().items()})
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.log_metrics(result.logged(), step=step)
                tqdm.write(result.table())
                self._show_pictures(trainer, result)
                result.write(run / "validation", recipe, preparation, self.max_new_tokens)

    def _answers(
        self, trainer: Trainer, pl_module: LightningModule, title: str, benchmark: Benchmark, questions: list[Question]
    ) -> dict[str, str]:
        """The model's answer to every question, by id, on every rank."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        batches = share(questions, trainer.global_rank, trainer.world_size, self.batch_size)
        loader = DataLoader(
            Prompts(batches, benchmark, data.preparation, data.tokenizer, data.layout),
            batch_size=None,
            num_workers=data.num_workers,
            generator=torch.Generator(),  # else the loader would draw from the generator that training draws from
        )
        options = {"max_new_tokens": self.max_new_tokens, "end_token_id": data.preparation.end_token_id(data.tokenizer)}
        quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None
        answers: dict[str, str] = {}
        with evaluation_mode(pl_module), trainer.precision_plugin.val_step_context():
            for documents in tqdm(loader, desc=title, unit="batch", leave=False, disable=quiet):
                if isinstance(documents, RecipeError):
                    raise documents
                texts = pl_module.generate(documents, **options)  # type: ignore[operator]
                answers |= {document.sample_id: text for document, text in zip(documents, texts, strict=True)}
        if trainer.world_size == 1:
            return answers
        gathered: list[dict[str, str]] = [{}] * trainer.world_size
        torch.distributed.all_gather_object(gathered, answers)
        return {key: answer for of_rank in gathered for key, answer in of_rank.items()}  # a question asked twice counts once

    def _show_pictures(self, trainer: Trainer, result: Result) -> None:
        shown = [question for question in draw_questions(result.asked, self.num_pictures) if question.images]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and shown:
                sheet = answer_sheet(result.benchmark, shown, result.answers)
                logger.experiment.add_image(f"{result.shown_name}/answers", sheet, result.step, dataformats="HWC")


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
