"""A run that starts in vain again and again is refused; one that ends well, is told to end, or meets a mistake never is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_recipe import fit, write_recipe

from callbacks.guards.crash_loop import Starts
from callbacks.guards.preemption import Preempted
from components.errors import RecipeError
from components.run_folder import checkpoint_folder

QUIET = {"callbacks": [{"class_path": "tests.small_recipe.Diary"}], "enable_progress_bar": False}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_crash_loop_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "small.yaml", trainer=QUIET, guards={"max_fruitless_starts": 2})
    monkeypatch.setenv("CRASH", "3")
    for _ in range(3):  # from step 0, where it gets on, and then twice from step 2
        with pytest.raises(ZeroDivisionError):
            fit(recipe)
    monkeypatch.delenv("CRASH")
    Path("runs/small/hang_rank_5.txt").touch()
    capsys.readouterr()
    assert fit(recipe) == 2
    message = capsys.readouterr().err
    assert "The last 2 starts of runs/small all began at step 2 and ended before the next checkpoint" in message
    for words in ("ZeroDivisionError: the test wants it so", "hang_rank_5.txt", "guards.max_fruitless_starts = 2"):
        assert words in message
    assert fit(recipe, "--checkpoint.keep", "5") == 0  # a changed recipe
    entries = [json.loads(line) for line in Path("runs/small/starts.jsonl").read_text().splitlines()]
    assert [entry["start"] for entry in entries if "start" in entry] == [0, 2, 2, 2]
    assert entries[-1]["end"] == "finished"
    assert fit(recipe) == 0  # it is finished and stays so


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Starts]:
    """A start in a folder, from a step on."""

    def start(step: int = 2, recipe: str = "a recipe", writes: bool = True, is_alone: bool = True) -> Starts:
        monkeypatch.setattr("callbacks.guards.crash_loop.complete_checkpoints", lambda run: [checkpoint_folder(run, step)])
        return Starts(tmp_path, recipe, writes, is_alone)

    return start


@pytest.mark.parametrize(
    "well", [None, Preempted(), KeyboardInterrupt(), RecipeError("a sample is broken")], ids=lambda end: type(end).__name__
)
def test_starts_that_end_for_a_reason_are_no_loop(well: BaseException | None, starts: Callable[..., Starts]) -> None:
    for end in [RuntimeError("x"), RuntimeError("y"), well, RuntimeError("z"), RuntimeError("x")]:
        assert starts().problem(3) is None
        start = starts()
        start.begin()
        start.end(end)
    assert starts().problem(3) is None
    assert starts().problem(2) is not None


def test_kills_and_hangs_leave_starts_in_vain(starts: Callable[..., Starts], tmp_path: Path) -> None:
    starts().begin()  # and it is killed
    for phase in ("start", "step"):
        start = starts()
        start.begin()
        start.hang(phase)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"start": 2, "of')  # torn
    problem = starts().problem(3)
    assert problem is not None and "no progress in phase 'step'" in problem
    assert starts().problem(4) is None
    assert starts(step=4).problem(3) is None
    assert starts(recipe="another").problem(3) is None


def test_a_mistake_that_one_rank_alone_has_met_is_written_by_it_and_is_in_vain(
    starts: Callable[..., Starts], tmp_path: Path
) -> None:
    for _ in range(3):  # a requeued job meets the same broken sample again and again
        assert starts(is_alone=False).problem(3) is None
        first, other = (starts(writes=writes, is_alone=False) for writes in (True, False))
        first.begin()
        other.begin()
        other.end(RecipeError("a sample is broken"))
        first.hang("step")
    lines = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) - {"time", "of"} for line in lines[:3]] == [{"start"}, {"failed", "error"}, {"failed"}]
    problem = starts(is_alone=False).problem(3)
    assert problem is not None and "a sample is broken" in problem
