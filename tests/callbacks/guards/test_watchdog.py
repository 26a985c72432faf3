"""The watchdog on one process: what is too long, and what it leaves behind. Processes that it really ends: tests/distributed."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback
from tiny import Prepared, tiny_document, tiny_model, tiny_trainer

from callbacks.guards import Guards, HangMinutes
from callbacks.guards.records import Samples
from callbacks.guards.watchdog import EXIT_CODE, Watchdog
from components import phases
from components.batch import pack
from components.errors import RecipeError

SECOND = 1 / 60


class Ended(threading.Event):
    """What happens in place of the end of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[int] = []
        self.dog: Watchdog | None = None
        self.told: list[str] = []

    def exit(self, code: int) -> None:
        self.codes.append(code)
        if self.dog is not None:
            self.dog.over.set()
        self.set()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ended]:
    ended = Ended()
    monkeypatch.setattr(os, "_exit", ended.exit)
    yield ended
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()


def watchdog(folder: Path, ended: Ended, **minutes: float | None) -> Watchdog:
    samples = Samples()
    samples.under_way = ["sample 7", "sample 9"]
    ended.dog = Watchdog(HangMinutes(**minutes), folder, 3, samples, ended.told.append)
    return ended.dog


def test_a_phase_without_progress_ends_the_process(tmp_path: Path, ended: Ended, capfd: pytest.CaptureFixture[str]) -> None:
    phases.enter("validation")
    dog = watchdog(tmp_path, ended, validation=0.3 * SECOND)
    dog.start()
    for _ in range(10):  # progress
        time.sleep(0.1)
        phases.get_on()
    assert not ended.codes
    assert ended.wait(5)
    assert ended.codes == [EXIT_CODE] == [75]
    assert ended.told == ["validation"]
    for text in ((tmp_path / "hang_rank_3.txt").read_text(), capfd.readouterr().err):
        assert "rank 3: no progress in phase 'validation' for 0 s" in text
        assert "guards.hang_minutes.validation" in text and "exit code 75" in text
        assert "Samples under way: sample 7, sample 9" in text
        assert "test_a_phase_without_progress_ends_the_process" in text  # where this thread is
        assert "watchdog.py" in text


def test_a_phase_without_a_limit_may_take_any_time(tmp_path: Path, ended: Ended) -> None:
    phases.enter("validation")
    dog = watchdog(tmp_path, ended, validation=None, step=0.1 * SECOND)
    dog.start()
    time.sleep(0.5)
    dog.over.set()
    dog.join()
    assert not ended.codes


def test_steps_may_take_ten_times_their_median(tmp_path: Path, ended: Ended) -> None:
    dog = watchdog(tmp_path, ended, step=1.0)
    assert dog.limit("step") == 60
    dog.step_seconds.extend([1.0, 2.0, 100.0])
    assert dog.limit("step") == 60
    dog.step_seconds.extend([30.0] * 10)
    assert dog.limit("step") == 300
    assert dog.limit("checkpoint") == 30 * 60


def test_a_process_that_was_stopped_for_a_while_does_not_hang(
    tmp_path: Path, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases.enter("step")
    dog = watchdog(tmp_path, ended, step=1.0)
    dog.pause = 0.05
    dog.start()
    time.sleep(0.2)
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 1000)  # as after Ctrl+Z and fg, or a suspended job
    time.sleep(0.3)
    dog.over.set()
    dog.join()
    assert not ended.codes


def test_every_micro_batch_is_progress(tmp_path: Path) -> None:
    class Clock(Callback):
        def __init__(self) -> None:
            self.stamps: list[Any] = []

        def on_train_batch_start(self, *arguments: Any) -> None:
            self.stamps.append(phases._now)

    clock = Clock()
    batches = [pack([tiny_document(5 + number, (1,), number)]) for number in range(6)]
    trainer = tiny_trainer(3, callbacks=[Guards(), clock], default_root_dir=tmp_path)
    trainer.fit(tiny_model(), datamodule=Prepared(batches))
    assert [name for name, _ in clock.stamps] == ["start"] * 3 + ["step"] * 3
    assert len(set(clock.stamps)) == 6


@pytest.mark.parametrize("phase", ["start", "step", "validation", "checkpoint", "end"])
def test_limits_out_of_range_are_refused(phase: str) -> None:
    with pytest.raises(RecipeError, match=phase):
        HangMinutes(**{phase: 0.0})
