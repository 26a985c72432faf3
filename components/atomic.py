"""Files that are whole as soon as they are there.

Source: POSIX.1-2017, rename(): whoever opens the name meanwhile sees the old file or the new one.
"""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from components.errors import RecipeError


def save(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a name of its own, then give it the one it is asked for under.

    Args:
        path: The file; its folder is made.
        write: Writes the content.

    Raises:
        RecipeError: It cannot be written.
    """
    # by chance, not by the number of the process: machines that share the folder have the same ones
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # not "xb": into a file open for writing alone numpy writes past Python, and cannot say what failed
            with temporary.open("x+b") as file:
                write(file)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RecipeError(
            f"{path} could not be written: {error.strerror or error}. Free space there, give yourself write permission, or name "
            "another folder. What is finished is kept."
        ) from error
