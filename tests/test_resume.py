"""Kill a run and start it again: it ends with the same bits, after the same samples, as if nothing had happened."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_recipe import diary, fit, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from callbacks.checkpoint import Checkpoint
from callbacks.validation import Validation
from components.errors import RecipeError
from components.manifest import seal
from components.run_folder import complete_checkpoints
from tests.small_recipe import Diary

DIARY = {"callbacks": [{"class_path": "tests.small_recipe.Diary"}], "enable_progress_bar": False}
LONG = {"max_steps": 9, "trainer": {**DIARY, "accumulate_grad_batches": 2, "val_check_interval": 6}}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, Path]:
    """The folders of runs that nothing interrupted, by what is changed in their recipe."""
    return {}


@pytest.fixture
def whole(whole_runs: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Makes runs/whole the run of a recipe with these changes, trained by the first test that asks for it."""

    def whole(**changes: Any) -> None:
        key = json.dumps(changes)
        if key not in whole_runs:
            place = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                assert fit(write_recipe(place / "whole.yaml", **changes)) == 0
            whole_runs[key] = place / "runs/whole"
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs/whole").symlink_to(whole_runs[key])

    return whole


@pytest.fixture
def finished(whole: Callable[..., None], tmp_path: Path) -> Path:
    """A recipe whose run of four steps, runs/small, is finished; runs/whole is the same."""
    whole(trainer=DIARY)
    shutil.copytree(Path("runs/whole").resolve(), "runs/small")
    return write_recipe(tmp_path / "small.yaml", trainer=DIARY)


def steps(run: str) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in complete_checkpoints(Path("runs") / run)]


def state(run: str) -> dict[str, Any]:
    return torch.load(complete_checkpoints(Path("runs") / run)[-1] / "state", weights_only=False)


def losses(run: str) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    events = EventAccumulator(f"runs/{run}")
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal in structure, and to the last bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, other, f"{where}.{number}")
    else:
        assert ours == theirs, where


def assert_same_run(continued: str, whole: str) -> None:
    ours, theirs = state(continued), state(whole)
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert_same(ours[key], theirs[key], key)
    position = "epoch_loop.batch_progress"
    assert_same(ours["loops"]["fit_loop"][position]["current"], theirs["loops"]["fit_loop"][position]["current"], position)


def assert_same_diary(continued: str, whole: str, checkpoint: int, written: int) -> None:
    """What a run wrote before it ended and what it wrote after its checkpoint is what the whole run wrote there."""
    ours, theirs = diary(Path("runs") / continued), diary(Path("runs") / whole)
    assert ours[:written] == theirs[:written]
    after = [entry for entry in ours[written:] if entry["step"] > checkpoint]
    assert after == [entry for entry in theirs if entry["step"] > checkpoint]
    assert {entry["what"] for entry in after} == {"train", "validation"}


@pytest.mark.parametrize(("micro_batch", "by", "step"), [(8, signal.SIGTERM, 4), (9, signal.SIGUSR1, 5)])
def test_a_run_that_is_told_to_end_saves_first(
    micro_batch: int, by: signal.Signals, step: int, whole: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of an optimizer step (of two micro-batches), or in the middle of one, which is finished first."""
    options = LONG | {"checkpoint": {"every_n_steps": None}}
    whole(**options)
    recipe = write_recipe(tmp_path / "told.yaml", **options)
    write = Diary._write  # of the class that the recipe names

    def told(self: Diary, trainer: Any, what: str, entry: dict[str, Any]) -> None:
        write(self, trainer, what, entry)
        if [line["what"] for line in diary(Path("runs/told"))].count("train") == micro_batch:
            os.kill(os.getpid(), by)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(Diary, "_write", told)
        fit(recipe)
    assert exit_.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert steps("told") == [step]
    written = len(diary(Path("runs/told")))
    assert fit(recipe) == 0
    assert_same_run("told", "whole")
    assert_same_diary("told", "whole", step, written)
    assert losses("told") == losses("whole")


def test_the_last_checkpoint_is_written_before_the_benchmarks_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Validation, "validate", fails)
    with pytest.raises(ZeroDivisionError):
        fit(write_recipe(tmp_path / "small.yaml", max_steps=5))
    assert steps("small") == [4, 5]


def test_a_checkpoint_continues_under_a_strategy_of_its_kind(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = {"class_path": "components.sharding.HybridSharding", "init_args": {"replicas": 1, "shards": 1}}
    sharded = write_recipe(tmp_path / "sharded.yaml", trainer=DIARY | {"strategy": strategy})
    capsys.readouterr()
    assert fit(sharded, "--run", "small") == 2
    assert "step_00000004 is not sharded, but trainer.strategy is sharded" in capsys.readouterr().err
    file = complete_checkpoints(Path("runs/small"))[-1] / "state"
    file.unlink()
    file.mkdir()
    seal(file.parent, step=4)
    for command in ("fit", "validate"):
        assert main.main([command, "--config", str(finished)]) == 2
        assert "step_00000004 is sharded, but trainer.strategy is not sharded" in capsys.readouterr().err


@pytest.mark.parametrize(("crash", "checkpoint"), [("5", 4), ("6", 6), pytest.param("8", 8, marks=pytest.mark.slow)])
def test_a_crashed_run_continues_to_the_same_bits(
    crash: str, checkpoint: int, whole: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 9, "trainer": {**DIARY, "val_check_interval": 3}}
    whole(**options)
    recipe = write_recipe(tmp_path / "crashed.yaml", **options)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setenv("CRASH", crash)
        fit(recipe)
    assert steps("crashed")[-1] == checkpoint
    written = len(diary(Path("runs/crashed")))
    assert fit(recipe) == 0
    assert_same_run("crashed", "whole")
    assert_same_diary("crashed", "whole", checkpoint, written)


@pytest.mark.parametrize(
    ("before", "after", "crash"),
    [
        (4, 1, 5),
        (2, 4, 5),
        pytest.param(1, 2, 5, marks=pytest.mark.slow),
        pytest.param(4, 2, 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_may_continue_with_another_accumulation(
    before: int, after: int, crash: int, whole: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it moves to another number of devices: the same samples in every step, and the same weights up to rounding."""
    recipe = tmp_path / "moved.yaml"
    whole(max_steps=8, trainer=DIARY)
    write_recipe(recipe, max_steps=8, trainer=DIARY | {"accumulate_grad_batches": before})
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setenv("CRASH", str(crash))
        fit(recipe)
    write_recipe(recipe, max_steps=8, trainer=DIARY | {"accumulate_grad_batches": after})
    assert fit(recipe) == 0
    left = 8 - (crash - 1)

    def samples(run: str) -> list[list[str]]:
        """Samples of the optimizer steps from the checkpoint on."""
        entries = [entry for entry in diary(Path("runs") / run) if entry["what"] == "train"]
        accumulate = after if run == "moved" else 1
        entries = entries[-left * accumulate :]
        return [sorted(name for e in entries[n * accumulate :][:accumulate] for name in e["samples"]) for n in range(left)]

    assert samples("moved") == samples("whole")
    moved = state("moved")
    assert (moved["global_step"], moved["epoch"]) == (8, 0)
    assert moved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 8 * after
    for name, weights in state("whole")["state_dict"].items():
        torch.testing.assert_close(moved["state_dict"][name], weights, rtol=1e-3, atol=1e-5, msg=name)


def test_a_finished_run_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = diary(Path("runs/small"))
    capsys.readouterr()
    assert fit(finished) == 0
    output = capsys.readouterr().out
    assert "runs/small is finished: step 4 of 4. Start another with --run NAME." in output
    assert "python main.py ask --ckpt runs/small" in output
    assert diary(Path("runs/small")) == written


def test_a_changed_recipe_is_refused_with_its_difference(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(finished, trainer=DIARY, model={"learning_rates": {"projector": 2e-3}}, data={"seed": 5})
    assert fit(recipe) == 2
    message = capsys.readouterr().err.splitlines()
    assert message[0] == "error: runs/small was trained with another recipe:"
    assert message[1:3] == ["  model.learning_rates.projector: 0.001 -> 0.002", "  data.seed: 0 -> 5"]
    assert "--run NAME" in message[3]
    assert fit(recipe, "--run", "faster") == 0
    assert steps("faster") == [2, 4]
    assert "2e-3" in Path("runs/faster/recipe.yaml").read_text() or "0.002" in Path("runs/faster/recipe.yaml").read_text()


def test_how_it_runs_may_change(finished: Path) -> None:
    freer = {"trainer": DIARY | {"log_every_n_steps": 2, "logger": False}, "checkpoint": {"keep": 5}, "data": {"num_workers": 1}}
    assert fit(write_recipe(finished, **freer)) == 0


def test_what_a_kill_left_half_written_is_ignored_and_goes(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Path("runs/small/checkpoints")
    (checkpoints / "step_00000004").rename(checkpoints / "step_00000004.unfinished")
    (checkpoints / "step_00000002").joinpath("note").touch()
    (checkpoints / "step_00000001.deleted").mkdir()
    capsys.readouterr()
    assert fit(finished) == 0
    assert "continues at step 2 of 4" in capsys.readouterr().out
    assert sorted(folder.name for folder in checkpoints.iterdir()) == ["step_00000002", "step_00000004"]
    assert (checkpoints / "step_00000002" / "note").exists()


def test_a_checkpoint_that_lost_files_is_passed_over_and_written_anew(finished: Path) -> None:
    torn = Path("runs/small/checkpoints/step_00000004")
    content = (torn / "state").read_bytes()
    (torn / "state").write_bytes(content[:-1000])
    with pytest.warns(
        UserWarning, match=rf"Checkpoint {torn} is not complete and is passed over: state has {len(content) - 1000} bytes"
    ):
        assert fit(finished) == 0
    assert_same_run("small", "whole")
    assert (torn.with_name("step_00000004.damaged") / "state").read_bytes() == content[:-1000]


def test_a_run_without_a_logger_lives_in_its_folder_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "small.yaml", trainer=DIARY | {"logger": False})
    assert fit(recipe) == 0
    assert steps("small") == [2, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml", "runs"}
    assert fit(recipe) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values", [{"every_n_steps": 0}, {"every_n_minutes": 0.0}, {"every_n_minutes": -1.0}, {"keep": 0}, {"max_failed_saves": 0}]
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(values))):
        Checkpoint(**values)
