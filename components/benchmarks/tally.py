"""Tally: what each picture's questions contribute to a score, added up for the score and drawn anew for its interval.

Every metric of a benchmark is a function of sums over units (pictures), so one formula gives the score, its bootstrap interval and
the interval of a difference between two models.

Source: percentile bootstrap, Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; clusters as in Miller,
Adding Error Bars to Evals (arXiv 2411.00640).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

RESAMPLES = 1000
CONFIDENCE = 0.95
_SEED = 0
_CHUNK = 2**22  # draws that are held in memory at a time

Sums = Float[np.ndarray, "*resamples"] | np.floating | float
"""A number, or one for each resample."""

Totals = Mapping[str, Sums]
"""Sums of counts by name."""


@dataclass(frozen=True)
class Tally:
    """Counts of units in, their sums out: of all units, or of as many drawn again and again with replacement.

    Args:
        units: Names of the units that are drawn together (a picture with all its questions), in order.
        strata: Number of the stratum of each unit; a resample has as many units of every stratum as there are.
        names: Names of the counts.
        counts: What each unit counts.
    """

    units: list[str]
    strata: Int64[np.ndarray, " units"]
    names: list[str]
    counts: Float64[np.ndarray, "units names"]

    def totals(self) -> Totals:
        """The sums over all units."""
        return dict(zip(self.names, self.counts.sum(axis=0), strict=True))

    def resampled(self, resamples: int = RESAMPLES) -> Totals:
        """The sums over units drawn with replacement, once for each resample. Tallies of the same units are drawn alike."""
        random = np.random.default_rng(_SEED)
        sizes = np.unique(self.strata, return_counts=True)[1]
        starts = np.cumsum(sizes) - sizes
        members = np.argsort(self.strata, kind="stable")
        sums = np.empty((resamples, len(self.names)))
        rows = max(1, _CHUNK // len(self.units))
        for first in range(0, resamples, rows):
            count = min(rows, resamples - first)
            drawn = np.concatenate(
                [start + random.integers(0, size, (count, size)) for start, size in zip(starts, sizes, strict=True)], axis=1
            )
            flat = (members[drawn] + np.arange(count)[:, None] * len(self.units)).ravel()
            times = np.bincount(flat, minlength=count * len(self.units)).reshape(count, -1)
            sums[first : first + count] = times @ self.counts
        return dict(zip(self.names, sums.T, strict=True))


def tally(entries: Iterable[tuple[str, str, Mapping[str, float]]]) -> Tally:
    """Entries of stratum, unit and counts in, a tally out; counts of a unit that occurs more than once are added up."""
    added: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    names: dict[str, None] = {}
    for stratum, unit, counts in entries:
        for name, count in counts.items():
            names[name] = None
            added[stratum, unit][name] += count
    keys = sorted(added)
    strata = {stratum: number for number, stratum in enumerate(dict.fromkeys(stratum for stratum, _ in keys))}
    return Tally(
        [unit for _, unit in keys],
        np.array([strata[stratum] for stratum, _ in keys], dtype=np.int64),
        list(names),
        np.array([[added[key].get(name, 0.0) for name in names] for key in keys], dtype=np.float64).reshape(len(keys), len(names)),
    )


def ratio(numerator: Sums, denominator: Sums, empty: float = np.nan) -> Sums:
    """Numerator / denominator; `empty` where the denominator is 0."""
    denominator = np.asarray(denominator, dtype=np.float64)
    return np.where(denominator == 0, empty, numerator / np.where(denominator == 0, 1.0, denominator))


def interval(values: Float64[np.ndarray, " resamples"]) -> tuple[float, float] | None:
    """The middle 95 % of resampled values; those without a value are left out. None where its ends coincide.

    They do where units count alike, such as a single one or right ones alone: these say nothing about the spread.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return (float(low), float(high)) if low < high else None
