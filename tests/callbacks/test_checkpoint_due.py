"""After which steps checkpoints are written, and how many are kept."""

import pytest
from short_run import steps, train

from components.run_folder import CHECKPOINTS, RECIPE, complete_checkpoints


@pytest.fixture
def run(tmp_path):
    (tmp_path / RECIPE).write_text("model: tiny\n")
    return tmp_path


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [
        ({"every_n_steps": 1, "keep": 3}, [3, 4, 5]),
        ({"every_n_steps": 2, "keep": 1}, [5]),
        ({"every_n_steps": 2, "keep": 9}, [2, 4, 5]),
        ({"every_n_steps": None}, [5]),
        ({"every_n_steps": None, "every_n_minutes": 1e-9, "keep": 9}, [1, 2, 3, 4, 5]),
        ({"every_n_steps": 4, "every_n_minutes": 60.0}, [4, 5]),
    ],
)
def test_when_checkpoints_are_written_and_how_many_are_kept(checkpoint, kept, run):
    train(run, **checkpoint)
    assert steps(run) == kept
    assert {folder.name for folder in (run / CHECKPOINTS).iterdir()} == {f"step_{step:08d}" for step in kept}
    for folder in complete_checkpoints(run):
        assert {file.name for file in folder.iterdir()} == {"state", "recipe.yaml", "manifest.json"}


def test_minutes_count_between_checkpoints(run, monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            self.now += 30.0  # seconds a look
            return self.now

    monkeypatch.setattr("callbacks.checkpoint.callback.time", Clock())
    train(run, every_n_steps=None, every_n_minutes=1.0, keep=9)
    assert steps(run) == [2, 4, 5]
