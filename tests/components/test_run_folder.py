"""Run folders: names, the newest complete checkpoint, and what may change between two starts of a run."""

from pathlib import Path

import pytest

from components.errors import RecipeError
from components.manifest import seal
from components.run_folder import (
    changes,
    checkpoint_folder,
    complete_checkpoints,
    find_checkpoint,
    newest_checkpoint,
    run_name,
)


def test_a_run_has_the_names_of_its_recipe_and_overlays() -> None:
    assert run_name(["recipes/quickstart.yaml"]) == "quickstart"
    assert run_name(["/home/me/a.yaml", "recipes/ablations/projector_linear.yaml"]) == "a+projector_linear"
    assert run_name([]) == ""


def saved(run: Path, step: int, name: str = "") -> Path:
    folder = run / "checkpoints" / name if name else checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("model: tiny")
    seal(folder, step)
    return folder


def test_the_newest_complete_checkpoint_is_found_by_its_step(tmp_path: Path) -> None:
    steps = [saved(tmp_path, step) for step in (900, 2_000, 10_000, 100)]
    assert complete_checkpoints(tmp_path) == [steps[3], steps[0], steps[1], steps[2]]
    assert find_checkpoint(tmp_path, "--ckpt") == steps[2]
    assert find_checkpoint(str(steps[0]), "--ckpt") == steps[0]


def test_nothing_but_complete_checkpoints_is_seen(tmp_path: Path) -> None:
    complete = saved(tmp_path, 10)
    for name in ("step_00000020.unfinished", "step_00000005.deleted", "best", "step_last", "step_"):
        saved(tmp_path, 0, name)
    assert complete_checkpoints(tmp_path) == [complete]
    assert find_checkpoint(tmp_path, "--ckpt") == newest_checkpoint(tmp_path) == complete
    checkpoint_folder(tmp_path, 8).mkdir()  # older than the complete one: nobody needs to know
    assert newest_checkpoint(tmp_path) == complete


def test_a_checkpoint_that_lost_files_is_told_and_passed_over(tmp_path: Path) -> None:
    complete = saved(tmp_path, 10)
    checkpoint_folder(tmp_path, 20).touch()
    checkpoint_folder(tmp_path, 30).mkdir()
    (saved(tmp_path, 40) / "recipe.yaml").write_text("mod")
    (saved(tmp_path, 50) / "recipe.yaml").unlink()
    assert complete_checkpoints(tmp_path) == [complete]
    with pytest.warns(UserWarning) as told:
        assert find_checkpoint(tmp_path, "--ckpt") == complete
    assert [str(warning.message).partition("checkpoints/")[2] for warning in told] == [
        "step_00000050 is not complete and is passed over: recipe.yaml is missing.",
        "step_00000040 is not complete and is passed over: recipe.yaml has 3 bytes instead of 11.",
        "step_00000030 is not complete and is passed over: it has no manifest.json.",
        "step_00000020 is not complete and is passed over: it has no manifest.json.",
    ]
    words = r"^--ckpt: .*step_00000040 is not complete: recipe\.yaml has 3 .* Complete checkpoints beside it: step_00000010\.$"
    with pytest.raises(RecipeError, match=words):
        find_checkpoint(checkpoint_folder(tmp_path, 40), "--ckpt")


def test_a_missing_checkpoint_names_the_option_and_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("runs/quickstart"), 10)
    Path("runs/empty").mkdir()
    with pytest.raises(
        RecipeError, match=r"^--ckpt: runs/quikstart does not exist\. Runs with a checkpoint here: runs/quickstart\."
    ):
        find_checkpoint("runs/quikstart", "--ckpt")
    with pytest.raises(RecipeError, match=r"^model\.initial_weights: runs/empty holds no complete checkpoint"):
        find_checkpoint("runs/empty", "model.initial_weights")


def test_changes_are_told_key_by_key() -> None:
    before = {
        "trainer": {"max_steps": 10},
        "model": {"depth": 2, "betas": [0.9, 0.95], "old": 1},
        "data": {"sources": {"a": {"w": 1}}},
    }
    after = {
        "trainer": {"max_steps": 20},
        "model": {"depth": 2, "betas": [0.9, 0.99], "new": None},
        "data": {"sources": {"a": {"w": 2}}},
    }
    assert changes(before, after) == [
        "trainer.max_steps: 10 -> 20",
        "model.betas: [0.9, 0.95] -> [0.9, 0.99]",
        "model.old: 1 -> (not there)",
        "data.sources.a.w: 1 -> 2",
        "model.new: (not there) -> None",
    ]
    assert changes(before, before) == []


def test_how_a_run_is_run_may_change() -> None:
    def recipe(number: int) -> dict:
        free = {
            "devices": number,
            "accumulate_grad_batches": number,
            "strategy": {"class_path": "x", "init_args": {"replicas": number}},
        }
        return {
            "trainer": {**free, "precision": "32"},
            "data": {"num_workers": number},
            "checkpoint": {"keep": number},
            "run": str(number),
        }

    assert changes(recipe(1), recipe(2)) == []
    numerics = [{"trainer": {"strategy": {"init_args": {"shards": n, "param_dtype": f"float{n}"}}}} for n in (16, 32)]
    assert changes(*numerics) == ["trainer.strategy.init_args.param_dtype: float16 -> float32"]
    # a free key does not free another that begins alike
    assert changes({"run": 1, "runner": 1}, {"run": 2, "runner": 2}) == ["runner: 1 -> 2"]
