"""Where a run lives: its name, its recipe and its checkpoints. Only paths and YAML, no torch."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

from components.errors import RecipeError
from components.manifest import what_is_missing

RUNS = Path("runs")
RECIPE = "recipe.yaml"
STATE = "state"
CHECKPOINTS = "checkpoints"
UNFINISHED = ".unfinished"
BEST = "best.json"
"""In the checkpoints' folder: which of them has the best score."""
_CHECKPOINT = re.compile(r"step_(\d+)")


def run_name(recipes: list[str]) -> str:
    """The name of the run of a recipe and its overlays: `quickstart`, `quickstart+projector_linear`."""
    return "+".join(Path(recipe).stem for recipe in recipes)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step stands inside a run folder."""
    return run / CHECKPOINTS / f"step_{step:08d}"


def visible_checkpoints(run: Path) -> list[Path]:
    """Whatever stands under the name of a checkpoint in a run, oldest first. Unfinished ones have another name."""
    folders = run.joinpath(CHECKPOINTS).glob("step_*")
    return sorted(folder for folder in folders if _CHECKPOINT.fullmatch(folder.name))


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run whose files are all there, oldest first."""
    return [folder for folder in visible_checkpoints(run) if what_is_missing(folder) is None]


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, if it has one; newer ones that are not complete are told and passed over."""
    for folder in reversed(visible_checkpoints(run)):
        problem = what_is_missing(folder)
        if problem is None:
            return folder
        warnings.warn(f"Checkpoint {folder} is not complete and is passed over: {problem}.", stacklevel=2)
    return None


def find_checkpoint(path: str | Path, key: str) -> Path:
    """The checkpoint that a run folder or checkpoint folder stands for.

    Args:
        path: A run folder (its newest complete checkpoint is meant), a checkpoint folder, or a run's `checkpoints/best.json`.
        key: The option that named the path, for the error message.

    Raises:
        RecipeError: There is no complete checkpoint.
    """
    path = Path(path)
    if path.name == BEST and path.is_file():
        try:
            path = checkpoint_folder(path.parent.parent, json.loads(path.read_text())["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{key}: {path} is damaged. Name a checkpoint folder.") from error
    if _CHECKPOINT.fullmatch(path.name) and path.exists():
        problem = what_is_missing(path)
        if problem is None:
            return path
        others = ", ".join(folder.name for folder in complete_checkpoints(path.parent.parent))
        raise RecipeError(f"{key}: {path} is not complete: {problem}. Complete checkpoints beside it: {others or 'none'}.")
    if found := newest_checkpoint(path):
        return found
    if not path.exists():
        known = sorted(str(run) for run in RUNS.glob("*") if complete_checkpoints(run))
        raise RecipeError(f"{key}: {path} does not exist. Runs with a checkpoint here: {', '.join(known) or 'none'}.")
    raise RecipeError(f"{key}: {path} holds no complete checkpoint. Train it first, or name another run folder.")


HOW_IT_RUNS = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
    "trainer.logger",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "data.num_workers",
    "data.max_bad_fraction",
    "data.weight_changes",
    "checkpoint",
    "guards",
    "throughput",
    "validation",
    "plan",
    "config",
    "run",
    "ckpt_path",
)
"""Keys of a recipe that may change when a run continues: they do not touch what is learned from which samples."""

NUMERICS = ("trainer.strategy.init_args.param_dtype", "trainer.strategy.init_args.reduce_dtype")
"""Keys below those of `HOW_IT_RUNS` that may not change all the same."""


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed between two resolved recipes, one `key: before -> after` a line, but only keys that may not change."""
    old, new = _flat(before), _flat(after)
    free = {key for key in {**old, **new} if any(key == how or key.startswith(f"{how}.") for how in HOW_IT_RUNS)}
    keys = [key for key in {**old, **new} if key not in free or key in NUMERICS]
    absent = "(not there)"
    return [f"{k}: {old.get(k, absent)} -> {new.get(k, absent)}" for k in keys if old.get(k, absent) != new.get(k, absent)]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, branch in tree.items() for key, value in _flat(branch, f"{prefix}{name}.").items()}
