"""A run that a signal tells to end: the ranks agree between two optimizer steps, save, and end with a code of their own.

Source: torch.distributed allows no collective in a signal handler. Differs from Lightning, whose handler begins one.
"""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Trainer
from tqdm import tqdm

from callbacks.checkpoint import Checkpoint

EXIT_CODE = 128 + signal.SIGTERM
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The end of a run that was told to end and has saved: its exit code is 143, which asks the launcher to start it again."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


_told = False
_before: dict[int | signal.Signals, Any] = {}


def is_told() -> bool:
    """Whether a signal has reached this rank since it listens."""
    return _told


def end_at_once() -> None:
    """From now on a signal ends the run wherever it is: before the first step there is nothing to save."""
    if not _before and threading.current_thread() is threading.main_thread():  # no other may handle signals
        _before.update({number: signal.getsignal(number) for number in SIGNALS})
        _handle(_end)


def listen() -> None:
    """From now on a signal only leaves a note: the ranks are in the middle of something, and must agree on where to end."""
    if _before:
        _handle(_note)


def restore(trainer: Trainer) -> None:
    """The run is over: signals do what they did before it."""
    global _told
    _told = False
    if trainer._signal_connector._original_handlers:  # Lightning restores, after an error, what it has found
        trainer._signal_connector._original_handlers.update(_before)
    for number, handler in _before.items():
        signal.signal(number, handler)
    _before.clear()


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    _note(number, frame)  # Python may be where it prints an exception and goes on, as in a finalizer
    raise Preempted


def _note(number: int, frame: FrameType | None) -> None:
    global _told
    _told = True


def end_if_told(trainer: Trainer) -> None:
    """Save and end if a signal has reached any rank. Called on all ranks, between two optimizer steps.

    Raises:
        Preempted: On all ranks.
    """
    if trainer.strategy.reduce_boolean_decision(_told, all=False):
        save_and_end(trainer)


def save_and_end(trainer: Trainer) -> None:
    """Save the step that the run has reached, if it has trained at all, and end. Called on all ranks.

    Raises:
        Preempted: On all ranks.
    """
    if trainer._logger_connector._first_loop_iter is not None:  # in a step: Lightning would log it after this hook
        trainer._logger_connector.update_train_step_metrics()
    saved = -1
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Checkpoint) and trainer.global_step:
            callback.save(trainer)
            saved = callback.saved_step
    run = Path(trainer.log_dir or ".")  # log_dir talks to all ranks
    if trainer.is_global_zero:
        where = f"saved at step {saved}" if saved >= 0 else "not saved"
        tqdm.write(f"{run} was told to end at step {trainer.global_step} and is {where}. The same command continues it.")
    raise Preempted
