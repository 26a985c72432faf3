"""Perceptual hashes: those of ImageHash, and what their table finds."""

import io
import itertools
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageDraw

from components.errors import RecipeError
from components.images import decode
from components.perceptual_hash import HashTable, perceptual_hash, picture_gray, same_picture, small_gray
from tests.natural_pictures import crop, texture

IMAGE_HASH = {
    "waves": "80002d6d8f2d7f3f",
    "shapes": "eb9595c00739913f",
    "long": "eb9595c00739913f",
    "gray": "f64f804d4e2bee18",
}
"""What `imagehash.phash` of ImageHash 4.3.2 gives for the drawn pictures."""


def drawn() -> dict[str, Image.Image]:
    """Pictures whose every pixel is decided here."""
    across, down = np.meshgrid(np.arange(97), np.arange(61))
    waves = np.stack([across * down % 251, (across**2 + 3 * down) % 256, (5 * across + down**2) % 240], axis=-1)
    shapes = Image.new("RGB", (120, 90), (250, 240, 200))
    pen = ImageDraw.Draw(shapes)
    pen.rectangle((10, 20, 60, 50), fill=(200, 30, 40))
    pen.ellipse((55, 30, 110, 85), fill=(20, 60, 180))
    pen.polygon([(5, 85), (40, 55), (70, 88)], fill=(10, 130, 70))
    return {
        "waves": Image.fromarray(waves.astype(np.uint8)),
        "shapes": shapes,
        "long": shapes.resize((400, 30), Image.Resampling.NEAREST),
        "gray": Image.fromarray(((across**2 * down + 7919 * across + 31 * down**2) % 256).astype(np.uint8)),
    }


@cache
def photographs(count: int, seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [crop(texture(random, 256), *(int(side) for side in random.integers(180, 257, 2)), random) for _ in range(count)]


def hashed(image: Image.Image) -> np.ndarray:
    return perceptual_hash(small_gray(image))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return decode(file.getvalue())


@pytest.mark.parametrize("name", list(IMAGE_HASH))
def test_hash_is_that_of_image_hash(name):
    assert f"{int(hashed(drawn()[name])):016x}" == IMAGE_HASH[name]


def test_hashes_are_those_of_image_hash_where_it_is_installed():
    imagehash = pytest.importorskip("imagehash", reason="ImageHash is not installed; its frozen values are compared above")
    for image in [*drawn().values(), *photographs(20)]:
        assert f"{int(hashed(image)):016x}" == str(imagehash.phash(image))


def test_hashes_of_many_are_those_of_each():
    grays = np.stack([small_gray(image) for image in photographs(4)])
    assert perceptual_hash(grays).tolist() == [int(perceptual_hash(gray)) for gray in grays]
    assert perceptual_hash(grays[:0]).shape == (0,)


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_picture_of_one_color_has_one_hash(level):
    assert int(hashed(Image.new("L", (50, 40), level))) == (2**63 if level else 0)


def test_bytes_are_decoded_upright_and_transparency_is_white():
    clear = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    clear.paste((200, 30, 30, 255), (10, 10, 30, 50))
    white = Image.new("RGB", (60, 60), "white")
    white.paste((200, 30, 30), (10, 10, 30, 50))
    assert np.array_equal(picture_gray(png(clear)), small_gray(white))


@pytest.mark.parametrize(("width", "height"), [(300, 400), (1030, 800), (2100, 1500)])
def test_large_jpegs_are_decoded_smaller_with_nearly_the_same_hash(width, height):
    random = np.random.default_rng(width)
    field = Image.fromarray(texture(random, 1024)).resize((2100, 2100))
    file = io.BytesIO()
    field.crop((0, 0, width, height)).save(file, "JPEG", quality=85)
    small = decode(file.getvalue(), smallest=128)
    assert min(small.size) >= 128
    assert min(small.size) < min(width, height) or min(width, height) < 256
    assert distances(perceptual_hash(picture_gray(file.getvalue())), hashed(decode(file.getvalue()))) <= 4


def test_only_what_is_large_and_a_jpeg_is_decoded_smaller():
    image = photographs(1)[0]
    assert decode(png(image), smallest=32).size == image.size
    file = io.BytesIO()
    image.save(file, "JPEG")
    assert np.array_equal(np.asarray(decode(file.getvalue(), smallest=128)), np.asarray(decode(file.getvalue())))


def distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.bitwise_count(left ^ right)


def random_hashes(count: int, random: np.random.Generator) -> np.ndarray:
    return random.integers(0, 2**64, count, dtype=np.uint64)


def flipped(hashes: np.ndarray, bits: int, random: np.random.Generator) -> np.ndarray:
    masks = [sum(1 << int(bit) for bit in random.permutation(64)[:bits]) for _ in hashes]
    return hashes ^ np.array(masks, dtype=np.uint64)


@pytest.mark.parametrize("distance", range(17))
def test_table_finds_what_comparing_all_pairs_finds(distance):
    random = np.random.default_rng(distance)
    hashes = random_hashes(300, random)
    hashes[:20] = hashes[20:40]  # several of one hash
    near = [flipped(hashes[::7], bits, random) for bits in range(distance + 3)]
    queries = np.concatenate([*near, random_hashes(100, random)])
    everything = distances(queries[:, None], hashes[None])
    query, found = np.nonzero(everything <= distance)
    ours = HashTable(hashes, distance).search(queries)
    assert len(query) > 40
    assert [side.tolist() for side in ours] == [query.tolist(), found.tolist(), everything[query, found].tolist()]


def test_table_is_exact_at_the_edges_of_its_bands():
    """Every pattern of two bits flipped, one in each of two bytes: no band may be forgotten, nor counted twice."""
    base = np.array([0x0123456789ABCDEF], dtype=np.uint64)
    flips = np.array([1 << a | 1 << b for a, b in itertools.combinations_with_replacement(range(64), 2)], dtype=np.uint64)
    for distance, expected in ((0, 0), (1, 64), (2, len(flips)), (9, len(flips))):
        assert len(HashTable(base, distance).search(base ^ flips)[0]) == expected


def test_table_splits_what_is_too_much_at_once(monkeypatch):
    monkeypatch.setattr("components.perceptual_hash._PAIRS_AT_ONCE", 7)
    hashes = np.zeros(10, dtype=np.uint64)
    query, found, distance = HashTable(hashes, 2).search(np.array([0, 1, 7, 3], dtype=np.uint64))
    assert query.tolist() == [0] * 10 + [1] * 10 + [3] * 10
    assert found.tolist() == list(range(10)) * 3
    assert distance.tolist() == [0] * 10 + [1] * 10 + [2] * 10


@pytest.mark.parametrize(("hashes", "queries"), [(0, 5), (5, 0), (0, 0)])
def test_table_of_nothing(hashes, queries):
    random = np.random.default_rng(0)
    ours = HashTable(random_hashes(hashes, random), 4).search(random_hashes(queries, random))
    assert [len(side) for side in ours] == [0, 0, 0]


@pytest.mark.parametrize("distance", [-1, 17])
def test_distance_out_of_range_is_refused(distance):
    with pytest.raises(RecipeError, match=f"is {distance} bits; it must be 0 to 16"):
        HashTable(np.zeros(1, dtype=np.uint64), distance)


COPIES = {
    "quality 50": lambda image: jpeg(image, 50),
    "quality 95": lambda image: jpeg(image, 95),
    "half size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "double size": lambda image: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "gray": lambda image: image.convert("L"),
    "2 % cut off": lambda image: image.crop((2, 2, image.width - 2, image.height - 2)),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_near_and_confirmed(copy):
    images = photographs(12)
    grays = np.stack([small_gray(image) for image in images])
    copies = np.stack([small_gray(COPIES[copy](image)) for image in images])
    assert distances(perceptual_hash(grays), perceptual_hash(copies)).max() <= 8
    assert same_picture(grays, copies).all()


def test_other_pictures_are_not_confirmed():
    grays = np.stack([small_gray(image) for image in photographs(30)])
    left, right = np.triu_indices(len(grays), 1)
    assert not same_picture(grays[left], grays[right]).any()


def test_nearly_uniform_pictures_are_confirmed_by_their_level():
    """Their hashes say little: in a white and in a gray page the same bits are set."""
    noise = np.random.default_rng(0).integers(-2, 3, (2, 32, 32))
    white, other_white, gray = (
        np.clip(level + part, 0, 255).astype(np.uint8) for level, part in zip((250, 250, 200), [*noise, noise[0]], strict=True)
    )
    assert distances(perceptual_hash(white), perceptual_hash(gray)) <= 2
    left, right = np.stack([white, white, white]), np.stack([white, other_white, gray])
    assert same_picture(left, right).tolist() == [True, True, False]
