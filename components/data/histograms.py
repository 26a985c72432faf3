"""Histograms: numbers counted exactly, added up over shards, and drawn as a picture inside a page."""

import html
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int, Num

BARS = 40
_WIDTH, _HEIGHT, _BELOW = 400, 120, 32
"""Of the picture and of the space for its axis, in pixels."""
_BAR, _TEXT = "#4d8fd6", "#808088"  # to be seen on white and on black


@dataclass(frozen=True)
class Counts:
    """How often each value occurs.

    Args:
        values: Different values, ascending.
        counts: How often each of them occurs.
    """

    values: Num[np.ndarray, " values"]
    counts: Int[np.ndarray, " values"]

    @classmethod
    def of(cls, numbers: Num[np.ndarray, " numbers"]) -> "Counts":
        """Numbers in, how often each occurs out."""
        return cls(*np.unique(numbers, return_counts=True))

    def __add__(self, other: "Counts") -> "Counts":
        values, places = np.unique(np.concatenate([self.values, other.values]), return_inverse=True)
        counts = np.bincount(places, np.concatenate([self.counts, other.counts]), len(values))
        return Counts(values, counts.astype(np.int64))

    @property
    def total(self) -> int:
        """Numbers that were counted."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """The smallest value that at least this share of the numbers, in [0, 1], does not exceed."""
        place = np.searchsorted(np.cumsum(self.counts), share * self.total)
        return float(self.values[min(int(place), len(self.values) - 1)])


def in_words(counts: Counts) -> str:
    """Median, the middle nine tenths, and the ends."""
    shown = [_number(counts.quantile(share)) for share in (0.5, 0.05, 0.95, 0.0, 1.0)]
    return f"median {shown[0]}, 5 to 95 %: {shown[1]} to {shown[2]}, all: {shown[3]} to {shown[4]}"


def picture(title: str, unit: str, counts: Counts, logarithmic: bool = False) -> str:
    """Counts in, an SVG picture of them out: bars up to the 99.5 % quantile; what is longer stands in the last one."""
    edges = _edges(counts, logarithmic)
    places = np.clip(np.searchsorted(edges, counts.values, side="right") - 1, 0, len(edges) - 2)
    bars = np.bincount(places, counts.counts, len(edges) - 1)
    width, tallest = _WIDTH / len(bars), max(float(bars.max()), 1.0)
    drawn, named = [], []
    for bar, count in enumerate(bars):
        height = _HEIGHT * count / tallest
        last = " and more" if bar == len(bars) - 1 and counts.values[-1] > edges[-1] else ""
        told = f"{_number(edges[bar])} to {_number(edges[bar + 1])}{last} {unit}: {count:,.0f}"
        drawn.append(
            f'<rect x="{bar * width + 0.5:.2f}" y="{_HEIGHT - height:.2f}" width="{width - 1:.2f}" height="{height:.2f}">'
            f"<title>{html.escape(told)}</title></rect>"
        )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        edge = edges[round(share * (len(edges) - 1))]
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        named.append(f'<text x="{share * _WIDTH:.0f}" y="{_HEIGHT + 16}" text-anchor="{anchor}">{_number(edge)}</text>')
    words = html.escape(f"{title}, {unit}" if unit else title)
    return (
        f'<figure><figcaption>{words}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT + _BELOW}" role="img" aria-label="{words}">'
        f'<g fill="{_BAR}"><rect y="{_HEIGHT}" width="{_WIDTH}" height="0.5"/>{"".join(drawn)}</g>'
        f'<g fill="{_TEXT}" font-size="12" font-family="sans-serif">{"".join(named)}</g></svg>'
        f"<figcaption>{html.escape(in_words(counts))}</figcaption></figure>"
    )


def _edges(counts: Counts, logarithmic: bool) -> Float64[np.ndarray, " edges"]:
    low, high = float(counts.values[0]), counts.quantile(0.995)
    if logarithmic and low > 0:
        return np.geomspace(low / 1.01, max(high, low) * 1.01, BARS + 1)
    if np.issubdtype(counts.values.dtype, np.integer):  # bars of equally many whole numbers, or every other bar is taller
        step = max(1, -(-int(high - low + 1) // BARS))
        return low + step * np.arange(-(-int(high - low + 1) // step) + 1, dtype=np.float64)
    return np.linspace(low, max(high, low + 1), BARS + 1)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
