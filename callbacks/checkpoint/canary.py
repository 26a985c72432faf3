"""A checkpoint before the first step, written and loaded as all others are: what is wrong with the disk shows in minute one."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim import Optimizer

from callbacks.checkpoint.saving import Saving, first_problem, size
from components.errors import RecipeError
from components.manifest import damaged_files, read_manifest
from components.run_folder import CHECKPOINTS, STATE

CANARY = "canary"

say = rank_zero_only(print)


def try_checkpoint(trainer: Trainer, run: Path, at_once: int) -> None:
    """Write a checkpoint of what the run starts from, verify and load it, remove it, and say what it took. Called on all ranks.

    Args:
        trainer: The trainer, before the first step.
        run: The run folder.
        at_once: Checkpoints that the run will have on the disk at the same time, >= 1.

    Raises:
        RecipeError: It cannot be written, or the disk has no room for as many; on all ranks.
    """
    folder = run / CHECKPOINTS
    with states_of_zeros(trainer.optimizers):
        saving = Saving(trainer, run, folder / CANARY, asynchronous=False)
        problem = saving.finish()
        each = size(saving.num_bytes)
        if problem:
            raise RecipeError(
                f"checkpoint: {folder} does not take a checkpoint of {each}, tried before the first step: {problem}. Make room, or "
                "make the folder writable for every node; runs may be a link to a folder on another disk."
            )
        begin = time.monotonic()
        verify(trainer, folder / CANARY)
        problem = None
        try:
            load(trainer, folder / CANARY)
        except Exception as error:  # whatever it is, the other ranks wait
            problem = f"{type(error).__name__}: {error}"
        if problem := first_problem(trainer, problem):
            raise RecipeError(f"checkpoint: what was written to {folder} before the first step does not load: {problem}")
        seconds = time.monotonic() - begin
    needed = at_once * saving.num_bytes
    free: int = trainer.strategy.broadcast(_remove(folder / CANARY) if trainer.is_global_zero else 0)
    room = f"{at_once} of them at once need {size(needed)} of {size(free)} that are free"
    if free < needed:
        raise RecipeError(
            f"checkpoint: {folder} has too little room: a checkpoint is {each}, and {room}. Make room, lower checkpoint.keep, or "
            "make runs a link to a folder on another disk."
        )
    say(f"checkpoints of {each}: written in {saving.seconds:.1f} s and loaded in {seconds:.1f} s; {room}")


def verify(trainer: Trainer, checkpoint: Path) -> None:
    """Read all files of a complete checkpoint, every rank some of them, and compare their hashes. Called on all ranks.

    Raises:
        RecipeError: A file is damaged; on all ranks.
    """
    problem = None
    try:
        names = sorted(read_manifest(checkpoint))
        if damaged := damaged_files(checkpoint, names[trainer.global_rank :: trainer.world_size]):
            problem = f"{damaged[0]} is not what was written"
    except OSError as error:
        problem = str(error)
    if problem := first_problem(trainer, problem):
        raise RecipeError(
            f"{checkpoint} is damaged ({problem}). Move the folder away: the run then continues from the checkpoint before it."
        )


def load(trainer: Trainer, checkpoint: Path) -> None:
    """Load weights and optimizer states as a run does that continues."""
    state = trainer.strategy.load_checkpoint(checkpoint / STATE, weights_only=False)
    trainer.strategy.load_model_state_dict(state, strict=trainer.lightning_module.strict_loading)
    trainer.strategy.load_optimizer_state_dict(state)


@contextmanager
def states_of_zeros(optimizers: list[Optimizer]) -> Iterator[None]:
    """Optimizers have as much state as after their first step, and none again afterwards. Weights stay as they are."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    try:
        yield
    finally:
        for optimizer in optimizers:
            optimizer.state.clear()


def _remove(folder: Path) -> int:
    """Remove a folder; the bytes that are free afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.disk_usage(folder.parent).free
