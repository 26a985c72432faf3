"""Permutations: bijections of every size, uniform to the eye of a chi-square test, and independent of one another."""

from itertools import permutations

import numpy as np
import pytest

from components.data.permutation import _SORTED, key_of, mix, permute, shuffled


def all_of(keys: np.ndarray, size: int) -> np.ndarray:
    """The permutations of some keys, one a row."""
    places = np.tile(np.arange(size, dtype=np.uint64), len(keys))
    return permute(np.repeat(keys, size), np.full_like(places, size), places).reshape(len(keys), size).astype(np.int64)


def some_keys(count: int, of: int = 0) -> np.ndarray:
    return mix(np.arange(count, dtype=np.uint64) + np.uint64(of * 10**9))


def deviations(counts: np.ndarray) -> float:
    """Chi-square of counts against equal ones, in standard deviations from what chance gives.

    A table counts how often permutations take a place to a value: rows and columns add up to the same, so that its n x n entries
    have (n - 1)^2 degrees of freedom, each with a variance of 1 / (n - 1) a permutation.
    """
    expected = counts.sum() / counts.size
    square = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    if counts.ndim == 2:
        freedom = (len(counts) - 1) ** 2
        square *= (len(counts) - 1) / len(counts)
    return float((square - freedom) / np.sqrt(2 * freedom))


def places_and_values(places: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    return np.bincount((places * size + values).ravel(), minlength=size**2).reshape(size, size)


@pytest.mark.parametrize("size", [*range(1, 90), 255, 256, 257, 1_000, 4_095, 4_096, 4_097, 65_537, 665_298])
def test_every_number_once(size: int) -> None:
    keys = some_keys(3 if size < 10_000 else 1, of=size)
    assert (np.sort(all_of(keys, size), 1) == np.arange(size)).all()


def test_numbers_of_sizes_that_no_memory_holds() -> None:
    """603 million samples, and some that would need more than 32 bits."""
    for size in (603_000_000, 2**33 + 7, 10**12):
        places = np.arange(0, size, size // 50_000, dtype=np.uint64)
        numbers = permute(np.repeat(some_keys(1), len(places)), np.full_like(places, size), places)
        assert numbers.max() < size
        assert len(np.unique(numbers)) == len(places)
        assert abs(deviations(np.histogram(numbers, 200, (0, size))[0])) < 4.5


def test_sizes_and_keys_mix_in_one_call() -> None:
    sizes = np.array([1, 5, _SORTED, _SORTED + 1, 500, 70_000], dtype=np.uint64)
    keys, places = some_keys(6), sizes // np.uint64(2)
    together = permute(keys, sizes, places)
    assert together.tolist() == [int(permute(keys[i:][:1], sizes[i:][:1], places[i:][:1])[0]) for i in range(6)]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_few_are_as_likely(size: int) -> None:
    rows = all_of(some_keys(20_000), size)
    codes = rows @ size ** np.arange(size)
    counts = np.array([(codes == np.array(order) @ size ** np.arange(size)).sum() for order in permutations(range(size))])
    assert counts.sum() == len(rows)
    assert abs(deviations(counts)) < 4.5


@pytest.mark.parametrize("numbers", [40_000, pytest.param(500_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [*range(2, 21), 64, 65, 66, 100, 257, 1_000])
def test_every_place_goes_anywhere_as_often(size: int, numbers: int) -> None:
    rows = all_of(some_keys(max(numbers // size, 1_000), of=3), size)
    assert abs(deviations(places_and_values(np.arange(size), rows, size))) < 4.5
    steps = np.bincount((rows[:, 1] - rows[:, 0]) % size, minlength=size)[1:]  # none between neighbors is preferred
    assert size == 2 or abs(deviations(steps)) < 4.5


@pytest.mark.parametrize("size", [5, 20, 65, 100])
def test_successive_keys_are_independent(size: int) -> None:
    """Keys that differ by one, as those of successive epochs and windows do."""
    rows = all_of(np.arange(100_000 // size, dtype=np.uint64), size)
    one, other = rows[:-1], rows[1:]
    assert abs(deviations(places_and_values(one, other, size))) < 4.5
    matches = (one == other).sum(1)  # of two independent permutations: one on average, with a variance of one
    assert abs(matches.mean() - 1) < 4.5 / np.sqrt(len(matches))
    assert abs(matches.var() - 1) < 0.2


def test_shuffled_numbers() -> None:
    orders = np.stack([shuffled(key_of(7, number), 20) for number in range(2_000)])
    assert (np.sort(orders, 1) == np.arange(20)).all()
    assert abs(deviations(places_and_values(np.arange(20), orders, 20))) < 4.5


def test_keys_differ_in_whatever_they_name() -> None:
    keys = {
        int(key_of(*parts)[0]) for parts in [(0,), (0, 0), (1,), (0, 1), (1, 0), (2**64 - 1,), (2**40, 3), (3, 2**40), (2**63, 0)]
    }
    assert len(keys) == 9


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of the generator seeded with 1234567, as its authors' program prints them."""
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
