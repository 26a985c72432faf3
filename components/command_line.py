"""The commands that train and validate: LightningCLI with run folders, callbacks as sections, and short errors."""

import logging
import os
import subprocess
import sys
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from callbacks.checkpoint import Checkpoint
from callbacks.guards import Guards
from callbacks.guards.preemption import EXIT_CODE
from callbacks.overview import Overview
from callbacks.prediction import Prediction
from callbacks.progress import Progress
from callbacks.throughput import Throughput
from callbacks.validation import Validation
from callbacks.warmup import Warmup
from components.benchmarks import QuestionFile
from components.benchmarks.report import PARTIAL
from components.data import InstructionData
from components.errors import RecipeError
from components.plan.assumptions import Assumptions
from components.recipe_files import NO_RECIPE, explain, named_recipes
from components.run_folder import BEST, CHECKPOINTS, RECIPE, RUNS, STATE, changes, find_checkpoint, newest_checkpoint, run_name
from components.sharding.refusals import demand_ours, demand_same_sharding, fsdp2_alone
from components.vlm import VisionLanguageModel

SECTIONS = {"warmup": Warmup, "throughput": Throughput, "guards": Guards, "checkpoint": Checkpoint, "validation": Validation}
"""Callbacks that are top-level sections of a recipe, so that an overlay merges them key by key."""

COMMANDS = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
    "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
    "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
    "predict": {"model", "dataloaders", "datamodule", "weights_only", "return_predictions"},
}
"""The Trainer's methods that are commands, with the arguments that are not options."""

NAME_BENCHMARKS = "Name some with --validation recipes/validation/NAME.yaml."
_SECONDS_TO_END = 10
"""For the processes that Lightning has started, when this one ends with an error."""


class RecipeCLI(LightningCLI):
    """A recipe in, a run in its own folder out."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        self._command = args[0] if run and isinstance(args, list) and args and args[0] in COMMANDS else None
        for chatter in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(chatter).setLevel(logging.WARNING)
        # lightning 2.6 calls what torch 2.15 has deprecated
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
        # no source holds samples out: the user's choice
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        # the order of the data is a function of the step: the loader needs no state to continue
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        # a short run logs what it logs
        warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
        strict = {"exit_on_error": False}
        super().__init__(
            VisionLanguageModel,
            InstructionData,
            args=args,
            run=run,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"config_filename": RECIPE, "overwrite": True},
            # the data deal their samples to the ranks themselves
            trainer_defaults={
                "callbacks": [Overview(), Progress()],
                "enable_model_summary": False,
                "use_distributed_sampler": False,
            },
            parser_kwargs=strict | {command: dict(strict) for command in self.subcommands()},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that is given, or all, with the arguments that this class gives to the Trainer's method.

        Differs: from Lightning, which builds the parsers of all four, each as long as the one that is used.
        """
        return {self._command: COMMANDS[self._command]} if self._command else COMMANDS

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_function_arguments(prediction, skip={"model_id"})
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The sections of a recipe besides trainer, model and data."""
        for name, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, name)
        parser.add_class_arguments(Assumptions, "plan")
        # a recipe names a trainer file and states beside it how long it trains
        parser.add_argument("--max_steps", type=int, help="Optimizer steps of the whole run, >= 1.")
        parser.link_arguments("max_steps", "trainer.max_steps")
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Name of the run folder inside runs/; by default the recipe's and overlays' names.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Mistakes are told in the words of the recipe, whose files `main.py` has checked."""
        if isinstance(args, dict | Namespace):
            self.config = parser.parse_object(args)
            return
        args = sys.argv[1:] if args is None else args
        recipes = named_recipes(args)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            command = args[0] if args and args[0] in self.subcommands() else None
            if command and not recipes:
                raise RecipeError(NO_RECIPE) from error
            message = explain(error, [action.dest for action in self._parser(command)._actions])
            raise RecipeError(message + fsdp2_alone(message)) from error

    def _get(self, config: Namespace, key: str, default: Any = None) -> Any:
        subcommand = self.config.get("subcommand")
        return (config[subcommand] if subcommand else config).get(key, default)

    def _parse_ckpt_path(self) -> None:
        """Lightning would replace the recipe's model by the checkpoint's; here the recipe decides."""

    def before_instantiate_classes(self) -> None:
        """Name the run folder, and continue from its newest complete checkpoint if it has one."""
        if self.subcommand is None:
            return
        recipes = [str(path) for path in self._get(self.config, "config") or []]
        name = self._get(self.config, "run") or run_name(recipes)
        if not name:
            raise RecipeError(NO_RECIPE)
        self.folder = RUNS / name
        self.step = 0
        if self.subcommand == "predict" and not (self._get(self.config, "input") and self._get(self.config, "output")):
            raise RecipeError("predict needs a file of questions and a name for the answers: --input FILE --output FILE.")
        if self.subcommand != "fit":
            path = self._get(self.config, "ckpt_path") or str(self.folder)
            self.checkpoint: Path | None = find_checkpoint(path, "--ckpt_path")
            if self.checkpoint.parent.name == CHECKPOINTS and not self._get(self.config, "run"):
                self.folder = self.checkpoint.parent.parent  # what is asked of a run is kept with it
        else:
            if self._get(self.config, "ckpt_path"):
                raise RecipeError("fit continues its own run by itself; to start from other weights give model.initial_weights.")
            self.checkpoint = newest_checkpoint(self.folder)
        if self.checkpoint is not None:
            self._refuse_other_layout(self.checkpoint)
            if self.subcommand == "fit":
                self._refuse_changed_recipe(self.checkpoint)
            self.step = int(self.checkpoint.name.removeprefix("step_"))
        self.config[self.subcommand].ckpt_path = None  # the trainer is told in another way

    def _refuse_other_layout(self, checkpoint: Path) -> None:
        strategy = self._get(self.config, "trainer").get("strategy")
        written = (yaml.safe_load((checkpoint / RECIPE).read_text()).get("trainer") or {}).get("strategy")
        is_sharded = (checkpoint / STATE).is_dir()
        demand_same_sharding(checkpoint, written, strategy, is_sharded, trains=self.subcommand == "fit")

    def _resolved(self) -> str:
        """The recipe as it is saved."""
        return self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)

    def _refuse_changed_recipe(self, checkpoint: Path) -> None:
        if changed := changes(yaml.safe_load((checkpoint / RECIPE).read_text()), yaml.safe_load(self._resolved())):
            lines = changed[:8] + ([f"... and {len(changed) - 8} more"] if len(changed) > 8 else [])
            raise RecipeError(
                f"{self.folder} was trained with another recipe:\n  "
                + "\n  ".join(lines)
                + "\nGive the new one a folder of its own with --run NAME, or restore the recipe to continue."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer writes into the run folder. `fit` voids events after the step it continues from; the others keep all."""
        demand_ours(self._get(self.config_init, "trainer").get("strategy"))
        purge_step = (self.step or None) if self.subcommand == "fit" else None
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.subcommand is not None and self._get(self.config_init, "trainer").get("logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.folder.parent, self.folder.name, version="", purge_step=purge_step)
        if self.subcommand is not None:
            kwargs["default_root_dir"] = self.folder  # where a run without a logger lives
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that NCCL remembers, for the dump of one that hangs
        if self._get(self.config_init, "trainer").get("enable_progress_bar") is False:
            self.trainer_defaults["callbacks"] = [Overview()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError) as error:
            raise RecipeError(f"trainer: {error}") from error
        if self.subcommand is not None and self.checkpoint is not None:
            trainer.ckpt_path = str(self.checkpoint / STATE)  # known before the model is built, which then reads no other weights
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # which would save inside a signal handler; the job's script queues it again
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave with the code of what ended this process, not with that of a process which it has started and which ended first."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            launcher = self.trainer.strategy.launcher
            children = list(getattr(launcher, "procs", []))
            if children:
                launcher.procs.clear()  # which Lightning's observer looks through, to kill this process if one of them has failed
            for child in children:
                try:
                    child.wait(_SECONDS_TO_END)
                except subprocess.TimeoutExpired:
                    child.kill()
            if isinstance(error, SIGTERMException):  # which alone would leave with 0, as if the command were finished
                raise SystemExit(EXIT_CODE) from error
            raise

    def fit(self, **kwargs: Any) -> None:
        """Train, unless the run is finished already; then show what to do next."""
        if self.step and self.step >= self.trainer.max_steps:
            print(f"{self.folder} is finished: step {self.step} of {self.trainer.max_steps}. Start another with --run NAME.")
        else:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Guards):
                    callback.recipe = self._resolved()
            self.trainer.fit(**kwargs)
        if self.trainer.is_global_zero:
            self._next_steps()

    def validate(self, **kwargs: Any) -> None:
        """Validation losses of a checkpoint, and benchmarks as the run asks them on the way."""
        if not self._get(self.config, "validation").benchmarks and not self.datamodule.validation_names:
            raise RecipeError(f"The recipe holds no samples out (validation_fraction) and names no benchmark. {NAME_BENCHMARKS}")
        self.trainer.validate(verbose=False, **kwargs)
        self._where_answers_are()

    def test(self, **kwargs: Any) -> None:
        """Every question of every benchmark."""
        if not self._get(self.config, "validation").benchmarks:
            raise RecipeError(f"The recipe names no benchmark. {NAME_BENCHMARKS}")
        self.trainer.test(verbose=False, **kwargs)
        self._where_answers_are()

    def predict(self, **kwargs: Any) -> None:
        """The questions of a file."""
        names = signature(prediction).parameters
        options = {name: self._get(self.config_init, name) for name in names if name != "model_id"}
        assert self.checkpoint is not None
        model_id = f"{self.checkpoint.parent.parent.name}/{self.checkpoint.name}"
        self.trainer.callbacks.append(prediction(model_id=model_id, **options))  # type: ignore[attr-defined]
        self.trainer.predict(return_predictions=False, **{name: value for name, value in kwargs.items() if name not in names})

    def _where_answers_are(self) -> None:
        if self.trainer.is_global_zero and self._get(self.config, "validation").benchmarks:
            print(f"Answers and records: {self.folder / 'validation'}\nCompare two of them: python main.py compare RECORD RECORD")

    def _next_steps(self) -> None:
        tables = sorted((self.folder / "validation").glob(f"*_step_{self.trainer.max_steps}.txt"))
        if self.step >= self.trainer.max_steps:
            print("\n".join(table.read_text() for table in tables))
            validation = self._get(self.config, "validation")
            asked = {table.name.rpartition("_step_")[0].removesuffix(PARTIAL) for table in tables}
            if validation.at_end and not set(validation.benchmarks) <= asked:
                print("Not every benchmark was asked at its end: python main.py test with the same --config asks them.")
        print(
            f"\nLook at the run:   tensorboard --logdir {self.folder}"
            f'\nAsk the model:     python main.py ask --ckpt {self.folder} --image PICTURE --question "..."'
        )
        if (best := self.folder / CHECKPOINTS / BEST).is_file():
            print(f"Test the best:     python main.py test with the same --config and --ckpt_path {best}")
        sys.stdout.flush()


def prediction(
    input: Path | None = None,
    output: Path | None = None,
    model_id: str = "",
    images: Path | None = None,
    prompt: str = "{question}",
    batch_size: int = 16,
    max_new_tokens: int = 128,
) -> Prediction:
    """A file of questions in, the callback that answers them out.

    Args:
        input: JSONL with `text` and `image` a line (optional `question_id`, `category`), as LLaVA's question files. Needed.
        output: JSONL that the answers go to; one that exists already is continued. Needed.
        model_id: Name of the model in every row.
        images: Folder that picture names are relative to; by default the folder of the input.
        prompt: What is asked, with `{question}` where the text of a line goes.
        batch_size: Prompts that each rank answers together, >= 1.
        max_new_tokens: Longest answer, in tokens, >= 1.
    """
    assert input is not None and output is not None
    questions = QuestionFile(str(input), str(images or input.parent), prompt)
    return Prediction(questions, output, model_id, batch_size, max_new_tokens)
