"""Histograms against numpy's, and what is drawn of them."""

import re
import xml.etree.ElementTree

import numpy as np
import pytest

from components.data.histograms import Counts, in_words, picture


@pytest.fixture
def numbers():
    return np.random.default_rng(0).lognormal(4, 0.5, 5000).astype(np.int64)


def test_counts_add_up_and_have_the_quantiles_of_numpy(numbers):
    parts = [Counts.of(part) for part in np.split(numbers, [0, 10, 2000])]
    counts = sum(parts[1:], parts[0])
    whole = Counts.of(numbers)
    np.testing.assert_array_equal(counts.values, whole.values)
    np.testing.assert_array_equal(counts.counts, whole.counts)
    assert counts.total == 5000
    for share in (0.05, 0.5, 0.95, 1.0):
        assert counts.quantile(share) == np.quantile(numbers, share, method="inverted_cdf")
    assert f"median {np.quantile(numbers, 0.5, method='inverted_cdf'):.0f}" in in_words(counts)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_bars_hold_every_number_once(numbers, logarithmic):
    svg = picture("captions <b>", "characters", Counts.of(numbers), logarithmic)
    root = xml.etree.ElementTree.fromstring(svg)
    told = [title.text for title in root.iter("title")]
    assert sum(int(re.search(r": ([\d,]+)$", text).group(1).replace(",", "")) for text in told) == 5000
    heights = [float(bar.get("height")) for bar in root.iter("rect")]
    assert 0 < max(heights) <= 120 and np.argmax(heights) not in (0, len(heights) - 1)


def test_equal_numbers_are_one_bar():
    root = xml.etree.ElementTree.fromstring(picture("sides", "pixels", Counts.of(np.full(7, 256))))
    assert [title.text for title in root.iter("title")] == ["256 to 257 pixels: 7"]
