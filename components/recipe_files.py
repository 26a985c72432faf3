"""Recipe files: read with the part files they name, and mistakes in them told in the words of the recipe."""

import re
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from components.errors import RecipeError

YAML = (".yaml", ".yml")
"""How the name of a part file ends."""

KEYS = frozenset(
    ("config", "seed_everything", "max_steps", "trainer", "model", "data", "plan", "run", "ckpt_path")
    + ("warmup", "throughput", "guards", "checkpoint", "validation")
)
"""What may stand at the top level of a recipe: the keys of the parser, which takes long to build."""

NO_RECIPE = "No recipe given. Example: python main.py fit --config recipes/quickstart.yaml"

_WORDS = (
    (r"Subcommand '\w+' does not accept option '([^']+)'", r"\1 is not a key of a recipe."),
    (r"the following arguments are required: (.+)", r"The recipe lacks \1."),
    (r"\b(fit|validate)\.", ""),
    (r'Parser key "([^"]+)"', r"\1"),
    (r"Expected a typing\.Literal", "Expected one of "),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
)
"""What jsonargparse says, and how a recipe's author would say it."""


def check_recipes(arguments: list[str]) -> None:
    """See that the files which a command names as its recipe are there and can be read, before anything heavy is imported.

    Args:
        arguments: Those of the command: `--config` names recipe and overlays, and an option such as `--validation` may name the
            part file of a section.

    Raises:
        RecipeError: One of them, or a part file that they name, is missing or not YAML, or a recipe has an unknown section.
    """
    for recipe in named_recipes(arguments):
        # an empty section that nobody knows would pass the parser
        if unknown := [section for section in read_recipe(Path(recipe)) if section not in KEYS]:
            raise RecipeError(f"{recipe}: {unknown[0]} is not a section of a recipe.{hint(str(unknown[0]), KEYS)}")
    words = [part for argument in arguments for part in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    for option, value in pairwise(words):
        if option.startswith("--") and option[2:].split(".")[0] in KEYS - {"config", "run"} and value.endswith(YAML):
            _read(Path(value), option)


def read_recipe(path: Path) -> dict[Any, Any]:
    """The sections of a recipe file.

    Args:
        path: The file. Every part file that it names, and that those name, is read too, but not put in its place.

    Raises:
        RecipeError: One of the files is missing or not YAML, or the recipe has no sections.
    """
    tree = _read(path, "--config")
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} {'is empty' if tree is None else 'has no sections'}. A recipe has trainer, model and data.")
    return tree


def named_recipes(arguments: list[str]) -> list[str]:
    """The values of `--config` among the arguments of a command."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    return parser.parse_known_args(arguments)[0].config


def hint(word: str, known: Iterable[str]) -> str:
    """What was probably meant, as a sentence, or nothing."""
    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def explain(error: BaseException, keys: Iterable[str]) -> str:
    """What jsonargparse found wrong, in short.

    Args:
        error: What it raised.
        keys: The keys that a recipe may have, for a hint.
    """
    message = str(error)
    if "Config file loop" in message:  # it reads a part that has a mistake again, as if it named itself, and tells the latter
        key, first = message.partition(":")[0], error
        while "Config file loop" in str(first) and (cause := first.__cause__ or first.__context__):
            first = cause
        message = f"{key}: {first}"
    for said, meant in _WORDS:
        message = re.sub(said, meant, message)
    unknown = re.match(r"(\S+) is not a key of a recipe\.", message)
    return message + hint(unknown[1], keys) if unknown else message


def _read(path: Path, named_by: str, above: tuple[Path, ...] = ()) -> Any:
    if path.resolve() in above:
        raise RecipeError(f"{named_by} names {path}, of which it is a part itself. Name another file.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{named_by}: {path} cannot be read ({error.strerror}). Correct its path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line} is not valid YAML: {getattr(error, 'problem', None) or error}.") from error
    try:
        parts = list(_parts(tree))
    except RecursionError as error:
        raise RecipeError(f"{path} holds an alias (*) inside what it stands for (&). Write it out.") from error
    for key, part in parts:
        _read(path.parent / part, f"{path}: {key}", (*above, path.resolve()))
    return tree


def _parts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys and names of the part files in a tree."""
    if isinstance(tree, str) and tree.endswith(YAML):
        yield key, tree
    elif isinstance(tree, dict | list):
        for name, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _parts(branch, f"{key}.{name}".removeprefix("."))
