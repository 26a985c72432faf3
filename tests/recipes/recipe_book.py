"""The recipe files as the tests see them: what is there, what it says, what the command line makes of it."""

import functools
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from components.run_folder import run_name

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"

FULL = sorted(RECIPES.glob("*.yaml"))
OVERLAYS = sorted(RECIPES.glob("ablations/*.yaml"))
FRAGMENTS = sorted(set(RECIPES.glob("*/*.yaml")) - set(OVERLAYS))
COMMAND = "# python main.py fit "


def name(path: Path) -> str:
    """A file's name in test ids: `quickstart`, `projector/mlp_2`."""
    return str(path.relative_to(RECIPES).with_suffix(""))


def load(path: Path) -> dict[str, Any]:
    """What a file states, other files unread."""
    return yaml.safe_load(path.read_text())


def commands(path: Path) -> list[tuple[str, ...]]:
    """The arguments of the commands in a file's second and following lines."""
    found = []
    for line in path.read_text().splitlines()[1:]:
        if not line.startswith(COMMAND):
            break
        found.append(tuple(shlex.split(line.removeprefix(COMMAND))))
    return found


def configs(arguments: tuple[str, ...]) -> list[Path]:
    """The recipe and overlays that a command names."""
    return [ROOT / value for option, value in pairwise(arguments) if option == "--config"]


def run(arguments: tuple[str, ...]) -> str:
    """The name of the run that a command starts."""
    return run_name([str(path) for path in configs(arguments)])


COMMANDS = {run(arguments): arguments for path in [*FULL, *OVERLAYS] for arguments in commands(path)}
"""Every command that a recipe or an overlay states, by the name of its run."""

TELLING = {run(commands(path)[0]) for path in [*FULL, *OVERLAYS]}
"""Runs of each recipe and of each overlay on the first recipe that it names."""


@functools.cache
def command_line():
    """The command line, parser and all, made once: parsing another recipe then takes a moment."""
    from components.command_line import RecipeCLI

    arguments = ["--config", str(RECIPES / "quickstart.yaml"), "--trainer.logger=false"]
    return RecipeCLI(arguments, run=False)


def resolve(arguments: tuple[str, ...]) -> Namespace:
    """What the command line makes of arguments. Not to be written to: every test gets the same."""
    return _resolve(tuple(str(ROOT / word) if word.startswith("recipes/") else word for word in arguments))


@functools.cache
def _resolve(arguments: tuple[str, ...]) -> Namespace:
    return command_line().parser.parse_args(list(arguments))


def recipe(run: str) -> Namespace:
    """A recipe without what its command adds to it, and with the overlays in its run's name."""
    return resolve(tuple(word for path in configs(COMMANDS[run]) for word in ("--config", str(path))))


def instantiate(arguments: tuple[str, ...]) -> Namespace:
    """The objects of a recipe: model, data, callbacks."""
    return command_line().parser.instantiate_classes(resolve(arguments))


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys to dotted ones; without what is no value: the paths that files were read from, and a part's empty arguments."""
    if isinstance(values, Namespace):
        values = vars(values)
    if not isinstance(values, dict) or (not values and not prefix.endswith("init_args")):
        return {prefix: values}
    nested = {key: value for key, value in values.items() if key != "__path__" and (prefix or key != "config")}
    return {leaf: x for key, value in nested.items() for leaf, x in flat(value, f"{prefix}.{key}" if prefix else key).items()}
