"""Files of a benchmark: what is missing or broken is told with the remedy."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from components.errors import RecipeError


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file.

    Args:
        path: The file.
        remedy: Where to get it and how to lay it out, for the message.

    Raises:
        RecipeError: The file is missing, truncated or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist. {remedy}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}). {remedy}") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not valid JSON, perhaps truncated: {error}. Fetch it again. {remedy}") from error


def demand_folder(path: Path, remedy: str) -> None:
    """A folder exists.

    Raises:
        RecipeError: It does not.
    """
    if not path.is_dir():
        raise RecipeError(f"The folder {path} does not exist. {remedy}")


def demand_pictures(folder: Path, names: Iterable[str], remedy: str) -> None:
    """Every picture is in a folder.

    Raises:
        RecipeError: One is not; the message says which one and how many.
    """
    names = list(dict.fromkeys(names))
    if missing := missing_pictures(folder, names):
        raise RecipeError(f"{folder} lacks {len(missing)} of {len(names)} pictures, {missing[0]} first. {remedy}")


def missing_pictures(folder: Path, names: Iterable[str]) -> list[str]:
    """The names that are no file in a folder."""
    return [name for name in names if not (folder / name).is_file()]


def read_picture(path: Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        RecipeError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"The picture {path} cannot be read ({error.strerror}). Restore it.") from error
