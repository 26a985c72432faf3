"""The fast path: the pixels of the exact path but for rounding, refusals at least as often, and nothing but JPEG.

The bounds are those that `components.images.square` states.
"""

import functools
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.images import BadImage, square
from tests.components.test_images import CLIP_MEAN, encoded, noise
from tests.natural_pictures import crop, jpegs, texture

MODES = ("pad", "crop", "squash")


@functools.cache
def field(side: int) -> np.ndarray:
    return texture(np.random.default_rng(0), side)


@functools.cache
def natural() -> list[bytes]:
    return [*jpegs(8, (300, 500)), *jpegs(8, (20, 300), seed=1), *jpegs(2, (700, 1000), seed=2)]


def difference(data: bytes, size: int, mode: str, decoding: str = "llava") -> tuple[float, int]:
    """Mean and maximum of the absolute difference between the paths, in levels of 255."""
    exact, fast = (square(data, size, mode, CLIP_MEAN, decoding, fast).astype(int) for fast in (False, True))
    levels = np.abs(exact - fast)
    return float(levels.mean()), int(levels.max())


@pytest.mark.parametrize("mode", MODES)
def test_natural_pictures_differ_by_rounding(mode: str) -> None:
    for data in natural():
        mean, most = difference(data, 336, mode)
        assert mean < 0.2, Image.open(io.BytesIO(data)).size
        assert most <= 3


@pytest.mark.parametrize("mode", MODES)
def test_real_pictures_differ_by_rounding(mode: str, realdata: Path) -> None:
    files = [file for folder in ("nlvr", "pairs", "twemoji") for file in sorted((realdata / folder).rglob("*.png"))[:300:30]]
    assert len(files) >= 20
    for file in files:
        picture = Image.open(file).convert("RGBA").convert("RGB")
        mean, most = difference(encoded(picture, "JPEG", quality=90), 336, mode)
        assert mean < 0.2
        assert most <= 3


@pytest.mark.parametrize("mode", MODES)
def test_large_pictures_are_decoded_smaller_and_differ_by_little(mode: str) -> None:
    random = np.random.default_rng(0)
    for size in ((512, 768), (768, 512), (640, 640), (400, 600), (601, 403)):
        data = encoded(crop(field(1024), *size, random), "JPEG", quality=90)
        mean, most = difference(data, 84, mode)
        assert (mean > 0.05) == (size != (601, 403))  # odd sides are decoded whole, or the picture would be shifted
        assert mean < 1
        assert most <= 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_upright_only(orientation: int, mode: str) -> None:
    random = np.random.default_rng(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for width, height, most_expected in ((61, 90, 3), (180, 121, 3), (504, 400, 8)):
        data = encoded(crop(field(512), width, height, random), "JPEG", quality=90, exif=exif)
        for decoding in ("llava", "upright"):
            mean, most = difference(data, 84, mode, decoding)
            assert mean < 1
            assert most <= most_expected
    turned = square(data, 84, mode, CLIP_MEAN, "upright", fast=True)
    assert (orientation == 1) == np.array_equal(turned, square(data, 84, mode, CLIP_MEAN, "llava", fast=True))


@pytest.mark.parametrize("size", [(1, 1), (64, 1), (1, 320), (800, 40), (40, 800), (28, 28), (28, 30)])
@pytest.mark.parametrize("mode", MODES)
def test_every_shape_and_gray(size: tuple[int, int], mode: str) -> None:
    random = np.random.default_rng(0)
    for kind in ("RGB", "L"):
        picture = crop(field(1024), *size, random).convert(kind)
        mean, _ = difference(encoded(picture, "JPEG", quality=95), 28, mode)
        assert mean < 2
    pixels = square(encoded(noise(*size), "JPEG"), 28, mode, CLIP_MEAN, fast=True)
    assert pixels.flags.c_contiguous and pixels.flags.writeable


def test_padding_has_the_truncated_color() -> None:
    pixels = square(encoded(Image.new("RGB", (56, 28)), "JPEG"), 28, "pad", CLIP_MEAN, fast=True)
    np.testing.assert_array_equal(pixels[:, 0].T, [(122, 116, 104)] * 28)
    np.testing.assert_array_equal(pixels[:, -1].T, [(122, 116, 104)] * 28)


OTHERS = {
    "PNG": lambda: encoded(noise(50, 40)),
    "WEBP": lambda: encoded(noise(50, 40), "WEBP"),
    "GIF": lambda: encoded(noise(50, 40), "GIF", save_all=True, append_images=[noise(40, 50)]),
    "BMP": lambda: encoded(noise(50, 40), "BMP"),
    "CMYK": lambda: encoded(noise(50, 40, "CMYK"), "JPEG"),
}


@pytest.mark.parametrize("decoding", ["llava", "upright"])
@pytest.mark.parametrize("kind", OTHERS)
def test_all_but_plain_jpegs_are_the_exact_pixels(kind: str, decoding: str) -> None:
    assert difference(OTHERS[kind](), 28, "pad", decoding) == (0, 0)


def test_the_first_picture_of_several_counts() -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    pixels = square(encoded(first, "MPO", save_all=True, append_images=[second]), 8, fast=True)
    assert pixels[0].min() > 200 and pixels[2].max() < 50


def outcome(data: bytes, fast: bool) -> str:
    try:
        square(data, 32, "pad", fast=fast)
    except BadImage as error:
        return str(error)
    return ""


def test_damage_is_refused_at_least_as_often(capfd: pytest.CaptureFixture[str]) -> None:
    """Cut off, bits flipped, a block zeroed: 3 x 100 pictures, none refused by the exact path alone."""
    random = np.random.default_rng(0)
    refused = {"cut off": 0, "flipped": 0, "zeroed": 0}
    for data in jpegs(10, (40, 120), seed=4):
        for _ in range(10):
            at, bit = int(random.integers(1, len(data) - 40)), 1 << int(random.integers(8))
            for how, damaged in {
                "cut off": data[:at],
                "flipped": data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :],
                "zeroed": data[:at] + bytes(40) + data[at + 40 :],
            }.items():
                exact, fast = outcome(damaged, fast=False), outcome(damaged, fast=True)
                assert fast or not exact, f"{how} at {at}: {exact}"
                refused[how] += bool(fast)
    assert refused["cut off"] == 100
    assert 0 < refused["flipped"] < 100 and 0 < refused["zeroed"] < 100
    capfd.readouterr()  # libjpeg warns on stderr


def test_the_reason_names_no_line_of_source() -> None:
    with pytest.raises(BadImage, match=r"^The 64 x 48 JPEG picture is damaged: Image is incomplete or truncated\.$"):
        square(encoded(noise(64, 48), "JPEG")[:-40], 32, fast=True)


def test_torchvision_is_imported_by_the_fast_path_alone_and_its_lack_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    data = encoded(noise(9, 9), "JPEG")
    square(data, 8)
    square(encoded(noise(9, 9)), 8, fast=True)
    with pytest.raises(ImportError):
        square(data, 8, fast=True)
