"""Perceptual hashes of pictures: equal or nearly equal for a picture and its recompressed or resized copies.

Source: `phash` of ImageHash 4.3.2 (github.com/JohannesBuchner/imagehash), after Krawetz, "Looks Like It" (hackerfactor.com, 2011).
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8, UInt64
from PIL import Image

from components.errors import RecipeError
from components.images import decode

SIDE = 32
"""Of the small gray picture that is hashed, in pixels."""
_ENOUGH = 128  # pixels of either side that a picture is decoded with, where a JPEG allows less than all
_FREQUENCIES = 8
_COSINES = 2 * np.cos(np.pi * np.outer(np.arange(_FREQUENCIES), 2 * np.arange(SIDE) + 1) / (2 * SIDE))
_ROUNDING = 1e-6  # coefficients of 8-bit pictures reach 10^6, where float64 rounds to 10^-10
_BITS = 64
_PAIRS_AT_ONCE = 2**21  # of a look-up: 50 MB

MAX_DISTANCE = 16
"""Largest distance that a table can be asked for; above it, unrelated pictures are found."""
UNIFORM = 4.0
"""Standard deviation of the small gray picture below which a picture counts as nearly uniform, in gray levels."""
SAME_CORRELATION = 0.8
SAME_DIFFERENCE = 4.0


def small_gray(image: Image.Image) -> UInt8[np.ndarray, "32 32"]:
    """A picture in, 32 x 32 gray pixels out, as ImageHash resizes them: by Lanczos, whatever the shape."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def picture_gray(data: bytes) -> UInt8[np.ndarray, "32 32"]:
    """Bytes of an encoded picture in, 32 x 32 gray pixels out: upright, transparency over white.

    A large JPEG is decoded at a fraction of its size, in about half of the time; its hash differs by 2 bits at most from that of
    the whole picture, seldom by 4.

    Raises:
        BadImage: The picture cannot or must not be decoded.
    """
    return small_gray(decode(data, smallest=_ENOUGH))


def perceptual_hash(grays: UInt8[np.ndarray, "*pictures 32 32"]) -> UInt64[np.ndarray, "*pictures"]:
    """Small gray pictures in, hashes of 64 bits out: which of the 8 x 8 lowest frequencies stand above their median.

    The first frequency is the highest bit, so `f"{hash:016x}"` is what ImageHash prints.

    Differs: a coefficient that equals the median gives 0. In ImageHash its bit is what rounding makes of it, which is noise for
    pictures of one color and for symmetric ones.
    """
    coefficients: Float64[np.ndarray, "*pictures 8 8"] = _COSINES @ grays.astype(np.float64) @ _COSINES.T
    flat = coefficients.reshape(*grays.shape[:-2], _FREQUENCIES**2)
    above = flat > np.median(flat, axis=-1, keepdims=True) + _ROUNDING
    return np.packbits(above, axis=-1).view(">u8")[..., 0].astype(np.uint64)


class HashTable:
    """Hashes in, a table out that finds all of them within a distance of others: exact, without comparing all pairs.

    A hash is cut into at least 4 bands, and more than half of the distance. Where two hashes differ in at most `distance` bits, one
    of their bands differs in at most one bit (in none if there are more bands than bits: pigeonhole), so only hashes whose bands
    agree to that degree are compared.

    Source: Norouzi, Punjani, Fleet, "Fast Exact Search in Hamming Space with Multi-Index Hashing" (arXiv 1307.2982), section 3.

    Args:
        hashes: The hashes to find.
        distance: Most bits in which a hash found may differ, 0 to 16.
    """

    def __init__(self, hashes: UInt64[np.ndarray, " hashes"], distance: int) -> None:
        if not 0 <= distance <= MAX_DISTANCE:
            raise RecipeError(f"The distance of near pictures is {distance} bits; it must be 0 to {MAX_DISTANCE}.")
        self.hashes, self.distance = hashes, distance
        num_bands = max(4, distance // 2 + 1)
        edges = [_BITS * band // num_bands for band in range(num_bands + 1)]
        self._bands = [_Band(hashes, first, last - first, distance // num_bands) for first, last in pairwise(edges)]

    def search(
        self, queries: UInt64[np.ndarray, " queries"]
    ) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
        """Hashes in; for each pair within the distance the number of the query, of the hash found, and their distance out."""
        pairs = [self._within(queries, *part) for band in self._bands for part in band.candidates(queries)]
        numbers = np.unique(np.concatenate([np.empty(0, np.int64), *pairs]))  # a pair may share more than one band
        query, found = np.divmod(numbers, max(1, len(self.hashes)))
        return query, found, np.bitwise_count(queries[query] ^ self.hashes[found]).astype(np.int64)

    def _within(self, queries: np.ndarray, query: np.ndarray, found: np.ndarray) -> np.ndarray:
        near = np.bitwise_count(queries[query] ^ self.hashes[found]) <= self.distance
        return query[near] * len(self.hashes) + found[near]


class _Band:
    """The hashes sorted by some of their bits, at most 16."""

    def __init__(self, hashes: np.ndarray, first: int, width: int, errors: int) -> None:
        self.first, self.mask = np.uint64(first), np.uint64(2**width - 1)
        bits = self._bits(hashes)
        self.order = np.argsort(bits, kind="stable")
        self.starts = np.searchsorted(bits[self.order], np.arange(2**width + 1))
        self.flips = [0, *(1 << bit for bit in range(width))] if errors else [0]

    def _bits(self, hashes: np.ndarray) -> np.ndarray:
        return ((hashes >> self.first) & self.mask).astype(np.int64)

    def candidates(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of query and hash whose bands agree, some at a time."""
        bits = self._bits(queries)
        for flip in self.flips:
            starts = self.starts[bits ^ flip]
            counts = self.starts[(bits ^ flip) + 1] - starts
            ends = np.cumsum(counts)
            first = 0
            while first < len(queries):
                last = int(np.searchsorted(ends, ends[first] - counts[first] + _PAIRS_AT_ONCE, side="right"))
                part = slice(first, max(first + 1, last))
                count = counts[part]
                place = np.arange(count.sum()) + np.repeat(starts[part] - (np.cumsum(count) - count), count)
                yield np.repeat(np.arange(len(queries))[part], count), self.order[place]
                first = part.stop


def same_picture(left: UInt8[np.ndarray, "pairs 32 32"], right: UInt8[np.ndarray, "pairs 32 32"]) -> Bool[np.ndarray, " pairs"]:
    """Two small gray pictures in, whether they show the same out.

    Their correlation is at least 0.8. It says nothing of nearly uniform pictures, which are compared by their mean difference: at
    most 4 gray levels (root of the mean square).
    """
    a, b = (part.reshape(len(part), -1).astype(np.float64) for part in (left, right))
    difference = np.sqrt(((a - b) ** 2).mean(axis=1))
    deviation = a.std(axis=1), b.std(axis=1)
    covariance = ((a - a.mean(axis=1, keepdims=True)) * (b - b.mean(axis=1, keepdims=True))).mean(axis=1)
    alike = covariance >= SAME_CORRELATION * deviation[0] * deviation[1]
    return np.where(np.minimum(*deviation) < UNIFORM, difference <= SAME_DIFFERENCE, alike)
