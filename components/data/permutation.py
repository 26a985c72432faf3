"""Permutations of any size as keyed bijections in 64-bit integers: nothing is held in memory, and no library decides them.

Black and Rogaway 2002, "Ciphers with arbitrary finite domains": a generalized Feistel network with cycle walking. Hashes are the
finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
"""

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 3  # of two halves each: measured, no deviation from uniform shows for more than 64 samples
_SORTED = 64  # samples up to which hashes are compared: a Feistel network of so few is not uniform
_WORD = 2**64 - 1
# arrays of one word: where few words are worked on, numpy is three times as fast with them as with numbers
_GAMMA, _FIRST, _SECOND = np.array([[0x9E3779B97F4A7C15], [0xBF58476D1CE4E5B9], [0x94D049BB133111EB]], dtype=np.uint64)
_27, _30, _31, _32 = np.array([[27], [30], [31], [32]], dtype=np.uint64)
_HALF_ROUNDS = np.arange(2 * _ROUNDS, dtype=np.uint64)[:, None] * _GAMMA
_OTHERS = np.arange(_SORTED, dtype=np.uint64)


def mix(words: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """A bijection of 64-bit words whose results look random."""
    words = (words ^ (words >> _30)) * _FIRST
    words = (words ^ (words >> _27)) * _SECOND
    return words ^ (words >> _31)


def key_of(*parts: int) -> UInt64[np.ndarray, " 1"]:
    """The key of what the parts name."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix(key + _GAMMA + (part & _WORD))
    return key


def shuffled(key: UInt64[np.ndarray, " 1"], size: int) -> Int64[np.ndarray, " size"]:
    """The numbers below a size in the order of their hashes, which never tie."""
    return np.argsort(mix(key + np.arange(size, dtype=np.uint64) * _GAMMA))


def permute(
    keys: UInt64[np.ndarray, " n"], sizes: UInt64[np.ndarray, " n"], places: UInt64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """Where each place in [0, size) goes in the permutation of its key.

    Args:
        keys: Decide the permutations; those of any two keys are independent.
        sizes: How many are permuted, >= 1.
        places: In [0, size).
    """
    keys = mix(keys)  # so that keys close to one another do not lead to permutations alike
    few = sizes <= _SORTED
    if few.all():
        return _by_rank(keys, sizes, places)
    if not few.any():
        return _feistel(keys, sizes, places)
    result = np.empty_like(places)
    for those, bijection in ((few, _by_rank), (~few, _feistel)):
        result[those] = bijection(keys[those], sizes[those], places[those])
    return result


def _by_rank(
    keys: UInt64[np.ndarray, " n"], sizes: UInt64[np.ndarray, " n"], places: UInt64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """The rank of a place's hash among all hashes of its permutation."""
    before = mix(keys[:, None] + _OTHERS * _GAMMA) < mix(keys + places * _GAMMA)[:, None]
    return (before & (sizes[:, None] > _OTHERS)).sum(1).astype(np.uint64)


def _feistel(
    keys: UInt64[np.ndarray, " n"], sizes: UInt64[np.ndarray, " n"], places: UInt64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """A place as (row, column) of a table barely larger than the size; each is moved in turn by a hash of the other."""
    rows = np.sqrt(sizes).astype(np.uint64) + 1
    columns = (sizes + rows - 1) // rows
    row, column = np.divmod(places, columns)
    for even, odd in zip(_HALF_ROUNDS[::2], _HALF_ROUNDS[1::2], strict=True):
        row = (row + (mix(keys + even + column) >> _32)) % rows
        column = (column + (mix(keys + odd + row) >> _32)) % columns
    moved = row * columns + column
    outside = moved >= sizes
    if outside.any():  # a cell of the table past the end: walk on until it is inside
        moved[outside] = _feistel(keys[outside], sizes[outside], moved[outside])
    return moved
