"""Two ranks write one checkpoint: the disk of one refuses, a file is damaged, one is slow. Neither waits for the other for ever."""

import json
import os
import resource
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from lightning import Callback
from tiny import TOWER_FROZEN
from training_runs import hybrid, slow, train, twenty_steps

from callbacks.checkpoint import Checkpoint, canary, saving, snapshot
from components.errors import RecipeError
from components.run_folder import CHECKPOINTS, RECIPE, checkpoint_folder, complete_checkpoints

STRATEGIES = {"fsdp": hybrid(1, 2), "hybrid": hybrid(2, 1), "ddp": lambda: "ddp"}
STEPS = twenty_steps(documents=4)[:5]


class Disk:
    """The files of a rank: they are refused at some steps, or wait at a gate."""

    def __init__(self, refusals, gate=None):
        self.refusals = {f"step_{step:08d}" if step else "canary": times for step, times in refusals.items()}
        self.gate = gate
        self.real = snapshot.hashed_file

    @contextmanager
    def file(self, path, name, files):
        if self.gate is not None and threading.current_thread() is not threading.main_thread():
            assert self.gate.wait(30)
        folder = (path.parent if path.parent.name.endswith(".unfinished") else path.parent.parent).name.removesuffix(".unfinished")
        with self.real(path, name, files) as stream:
            if self.refusals.get(folder, 0) > 0:
                self.refusals[folder] -= 1
                stream.write(b"half")
                raise OSError(28, "No space left on device")
            yield stream


class Opens(Callback):
    """Opens the gate after a step; which checkpoints were complete after each step."""

    def __init__(self, run, gate, step):
        self.run, self.gate, self.step, self.seen = run, gate, step, []

    def on_train_batch_end(self, trainer, *arguments):
        self.seen.append(steps(self.run))
        if trainer.global_step == self.step:
            self.gate.set()


def steps(run):
    return [int(folder.name.removeprefix("step_")) for folder in complete_checkpoints(Path(run))]


def trained(folder, strategy, refused=(-1, {}), slower=-1, options=None):
    """A run of five steps on this rank: its losses or what ended it, what it told, and which checkpoints it saw on the way.

    Args:
        folder: The run.
        strategy: Its name.
        refused: The rank whose disk refuses, and how often it does at which steps; 0 stands for the canary.
        slower: The rank that writes nothing beside training before step 4 is over.
        options: Of the checkpoints.
    """
    rank = int(os.environ["LOCAL_RANK"])
    gate = threading.Event() if slower == rank else None
    opens = Opens(folder, gate or threading.Event(), step=4)
    disk = Disk(refused[1] if rank == refused[0] else {}, gate)
    checkpoint = Checkpoint(**{"every_n_steps": 1, "keep": 9} | (options or {}))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patch.setattr(saving, "WAITS", (0.0, 0.0))
        patch.setattr(snapshot, "hashed_file", disk.file)
        try:
            run = train(
                TOWER_FROZEN,
                STEPS,
                ranks=2,
                strategy=STRATEGIES[strategy],
                callbacks=[opens, checkpoint],
                enable_checkpointing=True,
                default_root_dir=folder,
            )
            end = run.series("train/loss")
        except RecipeError as error:
            end = str(error)
    return end, [str(warning.message) for warning in told if "WITHOUT" in str(warning.message)], opens.seen


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path / "run")


def new_run(folder):
    folder.mkdir()
    (folder / RECIPE).write_text("model: tiny\n")
    return folder


@pytest.mark.parametrize(("strategy", "rank"), [("fsdp", 1), ("hybrid", 1), ("ddp", 0)])
def test_a_disk_that_refuses_one_rank_ends_both_before_the_first_step(pair, run, strategy, rank):
    for end, _, seen in pair.run(trained, str(run), strategy, (rank, {0: 3})):
        assert end.startswith(
            f"checkpoint: {run / CHECKPOINTS} does not take a checkpoint of 0.4 MiB, tried before the first step: "
        )
        assert f"rank {rank} on " in end and "No space left on device. Make room" in end
        assert seen == []
    assert list((run / CHECKPOINTS).iterdir()) == []


def trained_on_a_full_disk(folder):
    """What ends the run of a rank when the files of the second one may not be larger than 20,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["LOCAL_RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        return trained(folder, "fsdp")[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_for_one_rank_ends_both(pair, run):
    for end in pair.run(trained_on_a_full_disk, str(run)):
        assert "does not take a checkpoint of 0.4 MiB, tried before the first step: rank 1 on " in end
        assert "File too large" in end


@pytest.mark.parametrize(
    ("strategy", "rank", "asynchronous"), [("fsdp", 1, True), ("ddp", 0, False), slow("fsdp", 1, False), slow("ddp", 0, True)]
)
def test_a_save_that_fails_on_one_rank_is_given_up_by_both(pair, run, strategy, rank, asynchronous):
    """Twice is retried; three times is a save less; and as often in a row as the recipe says is the end."""
    options = {"max_failed_saves": 2, "asynchronous": asynchronous}
    first, second = pair.run(trained, str(run), strategy, (rank, {1: 2, 2: 3, 4: 3, 5: 9}), -1, options)
    assert first[0] == second[0]
    assert f"{checkpoint_folder(run, 5)} (0.4 MiB) could not be written: rank {rank} on " in first[0]
    assert "The run ends here" in first[0]
    assert len(first[1]) == 2 and second[1] == []  # told once
    assert steps(run) == [1, 3]
    assert len(list((run / CHECKPOINTS).iterdir())) == 2


def hashes(run, step):
    """Of the files that hold the tensors of a checkpoint."""
    files = json.loads((checkpoint_folder(run, step) / "manifest.json").read_text())["files"]
    return {name: facts["sha256"] for name, facts in files.items() if name.endswith(".distcp")}


@pytest.mark.parametrize("slower", [slow(0), 1])
def test_a_checkpoint_written_beside_training_is_visible_when_the_slower_rank_is_done(pair, tmp_path, slower):
    one, two = new_run(tmp_path / "synchronous"), new_run(tmp_path / "asynchronous")
    ((expected, _, _), _) = pair.run(trained, str(one), "fsdp", (-1, {}), -1, {"every_n_steps": 2})
    options = {"every_n_steps": 2, "asynchronous": True}
    for losses, told, seen in pair.run(trained, str(two), "fsdp", (-1, {}), slower, options):
        assert losses == expected
        assert seen == [[], [], [], [], [2]]  # a look before that of the checkpoints
        assert told == []
    assert steps(two) == steps(one) == [2, 4, 5]
    for step in (2, 4, 5):
        assert hashes(two, step) == hashes(one, step)
        assert len(hashes(one, step)) == 2


def refused_loading(folder):
    """What ends the run of a rank when the second one cannot load what was written."""
    real = canary.load

    def load(trainer, checkpoint):
        real(trainer, checkpoint)
        if trainer.global_rank == 1:
            raise FileNotFoundError(checkpoint / "state" / "meta.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canary, "load", load)
        return trained(folder, "fsdp")[0]


def test_a_canary_that_does_not_load_ends_both(pair, run):
    for end in pair.run(refused_loading, str(run)):
        assert "before the first step does not load: rank 1 on " in end
        assert "FileNotFoundError: " in end


def test_the_canary_changes_nothing_and_a_damaged_file_is_found_by_both(pair, tmp_path):
    one, two = new_run(tmp_path / "with"), new_run(tmp_path / "without")
    ((losses, _, _), _) = pair.run(trained, str(one), "fsdp")
    ((expected, _, _), _) = pair.run(trained, str(two), "fsdp", (-1, {}), -1, {"canary": False})
    assert losses == expected
    assert [hashes(one, step) for step in range(1, 6)] == [hashes(two, step) for step in range(1, 6)]

    file = checkpoint_folder(one, 5) / "state" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for end, _, _ in pair.run(trained, str(one), "fsdp"):
        assert "step_00000005 is damaged (rank " in end and "state/__1_0.distcp is not what was written)" in end


class Elsewhere(Callback):
    """The second rank has found an older checkpoint than the first one."""

    def setup(self, trainer, pl_module, stage):
        trainer.ckpt_path = str(checkpoint_folder(Path(trainer.log_dir), 6 - trainer.global_rank) / "state")


def trained_from_two_steps(folder):
    """What ends the run of a rank."""
    options = {"enable_checkpointing": True, "default_root_dir": folder}
    with pytest.raises(RecipeError) as error:
        train(TOWER_FROZEN, STEPS, ranks=2, strategy=STRATEGIES["ddp"], callbacks=[Elsewhere(), Checkpoint()], **options)
    return str(error.value)


def test_ranks_that_see_different_newest_checkpoints_end(pair, run):
    for end in pair.run(trained_from_two_steps, str(run)):
        assert f"{run / CHECKPOINTS} is not the same for every rank" in end
        assert "rank 1 on " in end and f"it sees {checkpoint_folder(run, 5) / 'state'}. Let all nodes share" in end
