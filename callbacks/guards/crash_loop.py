"""A run that starts again and again and never gets on: its starts and ends are written down, and one start too many is refused."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from callbacks.guards.preemption import Preempted
from callbacks.guards.records import append
from components.errors import RecipeError
from components.run_folder import complete_checkpoints

FILE = "starts.jsonl"
_HOUSE = Path(__file__).parents[2]


class Starts:
    """Starts and ends of a run in, lines of its `starts.jsonl` out.

    A start is in vain if the run neither finished, nor was told to end, nor was a single process that met a mistake in recipe or
    data. Of several ranks one may meet a mistake alone; the others then end otherwise, and the launcher starts them again.

    Args:
        run: The run folder.
        recipe: What is run, resolved.
        writes: Whether this is the rank that writes.
        is_alone: Whether there is no other rank.
    """

    def __init__(self, run: Path, recipe: str, writes: bool, is_alone: bool) -> None:
        self.file = run / FILE
        found = complete_checkpoints(run) if writes else []
        self.step = int(found[-1].name.removeprefix("step_")) if found else 0  # from which the run continues
        self.of = _fingerprint(recipe)
        self.writes = writes
        self.is_alone = is_alone

    def begin(self) -> None:
        """The run starts."""
        self._write({"start": self.step, "of": self.of})

    def end(self, exception: BaseException | None) -> None:
        """The run has finished, or ends with an exception."""
        if exception is None:
            self._write({"end": "finished"})
        elif isinstance(exception, Preempted):
            self._write({"end": "told to end"})
        elif isinstance(exception, KeyboardInterrupt):
            self._write({"end": "interrupted"})
        elif isinstance(exception, RecipeError):
            told = {"error": str(exception).splitlines()[0]}
            self._write({"end": "mistake", **told} if self.is_alone else {"failed": "mistake", **told}, any_rank=True)
        else:
            self._write({"failed": f"{type(exception).__name__}: {exception}"[:500]})

    def hang(self, phase: str) -> None:
        """The run is about to be ended, since it hangs."""
        self._write({"failed": f"no progress in phase '{phase}'"})

    def problem(self, most: int) -> str | None:
        """Why this start would be one too many, if it is."""
        if not self.file.is_file():
            return None
        in_vain: list[dict[str, Any]] = []
        lines: list[str] = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if "end" in entry:
                in_vain, lines = [], []
            else:
                lines.append(line)
                in_vain += [entry] if "start" in entry else []
        last = in_vain[-most:]
        if len(last) < most or any((entry["start"], entry["of"]) != (self.step, self.of) for entry in last):
            return None
        hangs = sorted(file.name for file in self.file.parent.glob("hang_rank_*.txt"))
        return (
            f"The last {most} starts of {self.file.parent} all began at step {self.step} and ended before the next checkpoint. "
            f"The last lines of {self.file}:\n  "
            + "\n  ".join(lines[-4:])
            + (f"\nWhere it hung: {', '.join(hangs[:8])} beside it." if hangs else "")
            + f"\nMend what ends it. Then delete {self.file}, or raise guards.max_fruitless_starts = {most}, to go on. A start "
            "with a changed recipe or changed code is not refused."
        )

    def _write(self, entry: dict[str, Any], any_rank: bool = False) -> None:
        if self.writes or any_rank:
            append(self.file, {"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry})


def _fingerprint(recipe: str) -> str:
    """Of the recipe and of this project's code: once either has changed, the run may end otherwise."""
    digest = hashlib.blake2b(recipe.encode(), digest_size=8)
    for file in sorted([_HOUSE / "main.py", *_HOUSE.glob("components/**/*.py"), *_HOUSE.glob("callbacks/**/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
