"""Checkpoints and the disk: tried before the first step, refused at any time, damaged later, written while training goes on."""

import re
import resource
import threading
from contextlib import contextmanager

import pytest
import torch
from lightning import Callback
from short_run import STEPS, assert_same, state, steps, train

from callbacks.checkpoint import callback, canary, saving, snapshot
from components.errors import RecipeError
from components.run_folder import CHECKPOINTS, RECIPE, checkpoint_folder

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(saving, "WAITS", (0.0, 0.0))


@pytest.fixture
def run(tmp_path):
    (tmp_path / RECIPE).write_text("model: tiny\n")
    return tmp_path


class Started(Callback):
    """Whether a run has got to its first step."""

    yes = False

    def on_train_batch_start(self, *arguments):
        self.yes = True


# --- before the first step


def test_the_canary_leaves_no_trace_in_the_run(tmp_path, capsys):
    logged = []
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECIPE).touch()
        logged.append(train(tmp_path / name, canary=name == "with")[0])
    assert logged[0] == logged[1]
    assert {folder.name for folder in (tmp_path / "with" / CHECKPOINTS).iterdir()} == {
        f"step_{step:08d}" for step in range(1, STEPS + 1)
    }
    for step in range(1, STEPS + 1):
        ours, theirs = (state(tmp_path / name, step) for name in ("with", "without"))
        for key in ("state_dict", "optimizer_states", "global_step"):
            assert_same(ours[key], theirs[key])
    assert capsys.readouterr().out.count("checkpoints of 0.8 MiB: written in 0.") == 1


def test_the_canary_is_as_large_as_the_checkpoints_that_follow(run, monkeypatch):
    sizes = []
    take = saving.take_snapshot

    def taken(*arguments, **options):
        result = take(*arguments, **options)
        sizes.append(result.num_bytes)
        return result

    monkeypatch.setattr(saving, "take_snapshot", taken)
    _, metrics = train(run)
    assert len(sizes) == STEPS + 1 and len(set(sizes)) == 1
    weights = sum(parameter.nbytes for parameter in state(run, 1)["state_dict"].values())
    assert sizes[0] > 2 * weights  # most of it trains, with two moments
    saves = [(step, values) for step, values in metrics if "checkpoint/gib" in values]
    assert [step for step, _ in saves] == [1, 2, 3, 4, 5]
    assert all(values["checkpoint/gib"] == sizes[0] / 2**30 and 0 < values["checkpoint/seconds"] < 60 for _, values in saves)


@contextmanager
def files_of_at_most(size):
    """As on a full disk: nobody writes more than so many bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_before_its_first_step(run):
    started = Started()
    with pytest.raises(RecipeError) as raised, files_of_at_most(100_000):
        train(run, [started])
    assert not started.yes
    words = str(raised.value)
    assert words.startswith(
        f"checkpoint: {run / CHECKPOINTS} does not take a checkpoint of 0.8 MiB, tried before the first step: rank 0 on "
    )
    assert "File too large. Make room" in words
    assert list((run / CHECKPOINTS).iterdir()) == []


def test_a_folder_that_cannot_be_made_ends_the_run_before_its_first_step(run):
    (run / CHECKPOINTS).touch()
    started = Started()
    with pytest.raises(RecipeError, match=r"does not take a checkpoint.*Not a directory"):
        train(run, [started])
    assert not started.yes


@pytest.mark.parametrize(
    ("options", "number"), [({"keep": 2}, 3), ({"keep": 9}, 5), ({"every_n_minutes": 9.0}, 10), ({"monitor": "a/b"}, 6)]
)
def test_a_disk_that_is_too_small_for_all_that_is_kept_ends_the_run(run, monkeypatch, options, number):
    sizes = []
    take = saving.take_snapshot
    monkeypatch.setattr(saving, "take_snapshot", lambda *a, **o: sizes.append(take(*a, **o).num_bytes) or take(*a, **o))
    monkeypatch.setattr(canary.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": sizes[-1] * number - 1}))
    with pytest.raises(RecipeError, match=rf"too little room: .* {number} of them at once need .* lower checkpoint\.keep"):
        train(run, **options)
    assert list((run / CHECKPOINTS).iterdir()) == []


# --- later


FULL = OSError(28, "No space left on device")


class Refusing:
    """A disk that refuses to write the state of some steps, so often each."""

    def __init__(self, monkeypatch, error=FULL, **refusals):
        self.error = error
        self.refusals = {f"step_{int(step[1:]):08d}": times for step, times in refusals.items()}
        self.real = snapshot.hashed_file
        monkeypatch.setattr(snapshot, "hashed_file", self.file)

    @contextmanager
    def file(self, path, name, files):
        with self.real(path, name, files) as stream:
            step = path.parent.name.removesuffix(".unfinished")
            if self.refusals.get(step, 0) > 0:
                self.refusals[step] -= 1
                stream.write(b"half")
                raise self.error
            yield stream


def test_a_write_that_fails_twice_is_tried_again(run, monkeypatch):
    Refusing(monkeypatch, s2=2)
    train(run)
    assert steps(run) == [1, 2, 3, 4, 5]


def test_a_save_that_fails_is_told_and_training_goes_on(run, monkeypatch):
    Refusing(monkeypatch, s2=3, s3=3)
    with pytest.warns(UserWarning, match="WITHOUT this checkpoint") as told:
        logged, _ = train(run)
    words = [str(warning.message) for warning in told if "checkpoint" in str(warning.message)]
    assert len(words) == 2
    assert f"{checkpoint_folder(run, 2)} (0.8 MiB) could not be written: rank 0 on " in words[0]
    assert "No space left on device" in words[0] and "ends if 2 more in a row" in words[0] and "ends if 1 more" in words[1]
    assert steps(run) == [1, 4, 5]
    assert len(logged) == STEPS
    assert {folder.name for folder in (run / CHECKPOINTS).iterdir()} == {"step_00000001", "step_00000004", "step_00000005"}


@pytest.mark.filterwarnings("ignore:.*WITHOUT this checkpoint")
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [FULL, MemoryError()], ids=["disk", "memory"])
def test_so_many_failed_saves_in_a_row_end_the_run(run, monkeypatch, asynchronous, error):
    Refusing(monkeypatch, error, s1=3, s2=0, s3=3, s4=3)
    told = str(error) or "MemoryError"
    with pytest.raises(RecipeError, match=rf"step_00000004 .* could not be written: .*: {re.escape(told)}\. The run ends here"):
        train(run, max_failed_saves=2, asynchronous=asynchronous)
    assert steps(run) == [2]


@pytest.mark.filterwarnings("ignore:.*WITHOUT this checkpoint")
def test_the_last_checkpoint_is_tried_once_more_and_its_loss_is_an_error(tmp_path, monkeypatch):
    for name, refusals in (("once", 3), ("always", 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECIPE).touch()
        Refusing(monkeypatch, s5=refusals)
        if name == "once":
            train(tmp_path / name)
        else:
            with pytest.raises(RecipeError, match="The run ends here"):
                train(tmp_path / name)
    assert steps(tmp_path / "once") == [1, 2, 3, 4, 5]
    assert steps(tmp_path / "always") == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:.*WITHOUT this checkpoint")
def test_nothing_is_written_over(run):
    folder = checkpoint_folder(run, 2)
    folder.mkdir(parents=True)
    mine = folder / "mine"

    class Other(Callback):
        """Another process writes the checkpoint of step 2 at the same time."""

        def on_train_start(self, trainer, pl_module):
            folder.mkdir()
            mine.touch()

    train(run, [Other()])
    assert steps(run) == [1, 3, 4, 5]
    assert mine.exists() and len(list(folder.iterdir())) == 1
    assert (run / CHECKPOINTS / "step_00000002.damaged").is_dir()  # what stood there at the start has kept its files


# --- afterwards


def test_a_bit_that_flipped_is_told_before_a_run_continues(run):
    train(run)
    file = checkpoint_folder(run, 5) / "state"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        RecipeError, match=r"step_00000005 is damaged \(rank 0 .* state is not what was written\)\. Move the folder away"
    ):
        train(run, resumed_from=file)
    checkpoint_folder(run, 5).rename(run / "away")
    train(run, resumed_from=checkpoint_folder(run, 4) / "state")
    assert_same(state(run, 5)["state_dict"], torch.load(run / "away" / "state", weights_only=False)["state_dict"])


def test_a_damaged_checkpoint_gives_its_name_to_the_next_one(run):
    train(run)
    (checkpoint_folder(run, 5) / "state").write_bytes(b"torn")
    expected = state(run, 4)
    train(run, resumed_from=checkpoint_folder(run, 4) / "state")
    assert steps(run) == [1, 2, 3, 4, 5]
    assert (run / CHECKPOINTS / "step_00000005.damaged" / "state").read_bytes() == b"torn"
    assert_same(state(run, 4)["state_dict"], expected["state_dict"])


# --- while training goes on


class Slow:
    """Writes wait until the test, or the run, lets them go on."""

    def __init__(self, monkeypatch, after=None):
        self.gate = threading.Event()
        self.real = snapshot.hashed_file
        monkeypatch.setattr(snapshot, "hashed_file", self.file)

    @contextmanager
    def file(self, path, name, files):
        if threading.current_thread() is not threading.main_thread():
            assert self.gate.wait(60)
        with self.real(path, name, files) as stream:
            yield stream


def test_what_is_written_while_training_goes_on_is_the_step_it_was_taken_at(tmp_path, monkeypatch):
    seen = []

    class Opens(Callback):
        """Lets the write of step 2 go on after step 4."""

        def on_train_batch_end(self, trainer, *arguments):
            seen.append(steps(tmp_path / "asynchronous"))
            if trainer.global_step == 4:
                slow.gate.set()

    for name in ("synchronous", "asynchronous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECIPE).touch()
    train(tmp_path / "synchronous", every_n_steps=2)
    slow = Slow(monkeypatch)
    train(tmp_path / "asynchronous", [Opens()], every_n_steps=2, asynchronous=True)
    assert seen[:4] == [[], [], [], []]
    assert steps(tmp_path / "asynchronous") == steps(tmp_path / "synchronous") == [2, 4, 5]
    for step in (2, 4, 5):
        ours, theirs = (state(tmp_path / name, step) for name in ("asynchronous", "synchronous"))
        for key in ("state_dict", "optimizer_states", "global_step", "loops"):
            assert_same(ours[key], theirs[key])


def test_a_save_waits_for_the_one_before_and_a_crash_for_both(run, monkeypatch):
    class Crashes(Callback):
        def on_train_batch_start(self, trainer, *arguments):
            if trainer.global_step == 3:
                slow.gate.set()
                raise ZeroDivisionError

    slow = Slow(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        train(run, [Crashes()], every_n_steps=3, asynchronous=True)
    assert steps(run) == [3]


def test_the_best_is_visible_before_it_is_named(run, monkeypatch):
    class Scores(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            checkpoint = trainer.checkpoint_callback
            checkpoint.save_if_due(trainer)
            slow.gate.set()
            checkpoint.keep_best(trainer, {"a/b": 1.0})
            assert callback._read_best(run)["step"] == 1

    slow = Slow(monkeypatch)
    train(run, [Scores()], monitor="a/b", asynchronous=True)
