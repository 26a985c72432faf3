"""Quarantine: the samples that a run could not use, written down, and an end to it when they are too many."""

import contextlib
import json
from pathlib import Path

from components.errors import RecipeError

MIN_DRAWN = 1000
"""The share of bad samples is taken of at least so many: a few at the beginning are no verdict on a source."""


class Quarantine:
    """Bad samples of this rank in, a line for each in the run's file out; too many of a source end the run.

    What earlier starts of the run have written down counts, shared evenly among the ranks of today: a run may continue on others.

    Args:
        file: Where they are written down, by all ranks.
        rank: This rank.
        ranks: Number of ranks.
        max_fraction: Share of the samples of each source that may be bad, in [0, 1).
    """

    def __init__(self, file: Path, rank: int, ranks: int, max_fraction: float) -> None:
        self.file = file
        self.rank = rank
        self.ranks = ranks
        self.max_fraction = max_fraction
        self.earlier = self._read()
        self.new: set[tuple[str, str]] = set()

    def add(self, source: str, reason: str, step: int, drawn: int) -> None:
        """Write down a sample that could not be used, once.

        Args:
            source: Name of its source.
            reason: Which sample, and why.
            step: Optimizer steps taken.
            drawn: Samples that all ranks have drawn from the source.

        Raises:
            RecipeError: The source has too many of them.
        """
        if (source, reason) in self.new | self.earlier:  # known from an earlier epoch, validation or start
            return
        self.new.add((source, reason))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "rank": self.rank, "source": source, "reason": reason}) + "\n")
        bad = self._count(self.new, source) + self._count(self.earlier, source) / self.ranks
        drawn = max(MIN_DRAWN, drawn // self.ranks)
        if bad > self.max_fraction * drawn:
            raise RecipeError(
                f"{reason}\n({bad:g} bad samples of {drawn} of data.sources.{source} on this rank, data.max_bad_fraction = "
                f"{self.max_fraction:g} allowed; all are listed in {self.file}. Mend or remove them, or raise it to skip such "
                "samples)"
            )

    @staticmethod
    def _count(samples: set[tuple[str, str]], source: str) -> int:
        return sum(of == source for of, _ in samples)

    def _read(self) -> set[tuple[str, str]]:
        """What earlier starts have written down; a line that a kill has cut off counts for nothing."""
        known = set()
        if self.file.is_file():
            for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    known.add((str(entry["source"]), str(entry["reason"])))
        return known
