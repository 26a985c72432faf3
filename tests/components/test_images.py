"""Pictures: equal to LLaVA-1.5 to the last bit, upright when asked, and safe on hostile bytes."""

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from components.images import BadImage, decode, to_square

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
DIFFERENT = {
    "one_px_high_64x1.png none": (
        "Without padding the original reads a height of 1 or 3 pixels as the number of channels: an error, or a wrong picture. "
        "Ours crops such a picture like any other; a golden one is 1 pixel high, none 3."
    ),
}
"""Golden outputs that ours do not equal, with the reason."""


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def test_pixels_equal_the_original(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = golden / "llava"
    expected = np.load(folder / "images_expected.npz")
    entries = json.loads((folder / "images.json").read_text())
    equal, different = [], set()
    for entry in entries:
        image = decode((folder / "images" / entry["file"]).read_bytes(), "llava")
        assert hashlib.sha256(image.tobytes()).hexdigest() == entry["sha256_rgb"], entry["file"]
        for output, details in entry["outputs"].items():
            pixels = to_square(image, 336, "pad" if output == "pad" else "crop", CLIP_MEAN)
            if not details.get("error") and np.array_equal(pixels.transpose(1, 2, 0), expected[details["key"]]):
                equal.append(details["key"])
            else:
                different.add(f"{entry['file']} {output}")
    assert different == set(DIFFERENT)
    assert sorted(equal) == sorted(expected.files)
    assert (len(entries), len(equal)) == (14, 27)
    with capsys.disabled():
        print(f"\n{len(entries)} pictures: {len(equal)} outputs equal, {len(different)} listed", end="")


@pytest.mark.parametrize("size", [(40, 31), (31, 40), (33, 33), (7, 5), (1, 20), (20, 1), (20, 3), (100, 28), (28, 28)])
def test_crop_equals_the_clip_processor(size: tuple[int, int]) -> None:
    processor_class = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = processor_class(size={"shortest_edge": 28}, crop_size=28, do_rescale=False, do_normalize=False)
    image = noise(*size)
    expected = processor(image, input_data_format="channels_last")["pixel_values"][0]
    np.testing.assert_array_equal(to_square(image, 28, "crop"), expected)


def test_padding_centers_the_picture_on_the_truncated_mean() -> None:
    white = np.full((3, 2, 5), 255, dtype=np.uint8)
    pixels = to_square(Image.new("RGB", (5, 2), "white"), 5, "pad", CLIP_MEAN)
    np.testing.assert_array_equal(pixels[:, 1:3], white)  # three rows are missing: one above, two below
    for row in (0, 3, 4):
        np.testing.assert_array_equal(pixels[:, row].T, [(122, 116, 104)] * 5)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_a_picture_of_the_right_size_is_not_changed(mode: str) -> None:
    image = noise(14, 14)
    pixels = to_square(image, 14, mode, CLIP_MEAN)
    np.testing.assert_array_equal(pixels, np.asarray(image).transpose(2, 0, 1))
    assert pixels.flags.c_contiguous and pixels.flags.writeable


def test_orientation_is_applied_upright_only() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    data = encoded(image, exif=exif)
    assert decode(data, "llava").tobytes() == image.tobytes()
    upright = decode(data, "upright")
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


def transparent_pictures() -> dict[str, Image.Image]:
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (200, 0, 0, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 1
    gray = Image.new("LA", (2, 1), (200, 255))
    gray.putpixel((1, 0), (200, 0))
    return {"RGBA": rgba, "P": palette, "LA": gray}


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparency_becomes_white_upright_only(mode: str) -> None:
    image = transparent_pictures()[mode]
    upright = decode(encoded(image), "upright")
    assert upright.mode == "RGB"
    assert upright.getpixel((1, 0)) == (255, 255, 255)
    assert upright.getpixel((0, 0)) == (200, 200 if mode == "LA" else 0, 200 if mode == "LA" else 0)
    assert decode(encoded(image), "llava").getpixel((1, 0)) != (255, 255, 255)


def test_half_transparency_is_mixed_with_white() -> None:
    upright = decode(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))), "upright")
    assert upright.getpixel((0, 0)) == (127, 127, 127)


def test_16_bit_gray_keeps_its_upper_8_bits_upright() -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    pixels = np.asarray(decode(encoded(Image.fromarray(values)), "upright"))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 128, 255])


@pytest.mark.parametrize("decoding", ["llava", "upright"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "P"])
def test_every_format_becomes_rgb(format: str, mode: str, decoding: str) -> None:
    image = noise(20, 15, mode)
    if (format, mode) in {("JPEG", "P"), ("PNG", "CMYK"), ("GIF", "CMYK"), ("BMP", "CMYK"), ("WEBP", "CMYK")}:
        image = image.convert("RGB")
    picture = decode(encoded(image, format), decoding)
    assert (picture.mode, picture.size) == ("RGB", (20, 15))


@pytest.mark.parametrize("decoding", ["llava", "upright"])
@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "MPO"])
def test_the_first_frame_counts(format: str, decoding: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    red, _, blue = decode(encoded(first, format, save_all=True, append_images=[second]), decoding).getpixel((4, 4))
    assert red > 200 and blue < 50


@pytest.mark.parametrize("decoding", ["llava", "upright"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_files_are_refused(format: str, decoding: str) -> None:
    data = encoded(noise(64, 64), format)
    for fraction in (0.05, 0.5, 0.9):
        with pytest.raises(BadImage, match="damaged|cannot be read|not a JPEG"):
            decode(data[: int(len(data) * fraction)], decoding)


def png_without_pixels(width: int, height: int) -> bytes:
    return png_header(width, height) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def text_bomb() -> bytes:
    text = png_chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(10**7)))
    return png_header(4, 4) + text + png_chunk(b"IDAT", b"")


def scan_bomb() -> bytes:
    """A progressive JPEG whose last scan is there 200 times: each costs a pass over the whole picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + 200 * data[last:-2] + data[-2:]


HOSTILE = {
    "scan bomb": (scan_bomb, r"JPEG has 2\d\d scans; the limit is 100"),
    "empty": (lambda: b"", r"empty \(0 bytes\)"),
    "too many bytes": (lambda: b"\xff\xd8" + bytes(32 * 2**20), "33554434 bytes; the limit is 33554432"),
    "web page": (lambda: b"<html><body>404 Not Found</body></html>", "not a JPEG, PNG, WEBP, GIF or BMP file"),
    "other format": (lambda: encoded(noise(8, 8), "TIFF"), "not a JPEG, PNG, WEBP, GIF or BMP file"),
    "zeros": (lambda: bytes(1000), "not a JPEG, PNG, WEBP, GIF or BMP file"),
    "50 megapixels and more": (lambda: png_without_pixels(10_000, 5_001), "10000 x 5001 pixels; the limit is 50 megapixels"),
    "100 megapixels": (lambda: png_without_pixels(10_000, 10_000), "10000 x 10000 pixels; the limit is 50 megapixels"),
    "400 megapixels": (lambda: png_without_pixels(20_000, 20_000), "400000000 pixels"),
    "thin": (lambda: png_without_pixels(1000, 40), "1000 x 40 pixels; at most 20 times as long as wide"),
    "long": (lambda: png_without_pixels(20_000, 1_000), "20000 x 1000 pixels; the limit is 16384 a side"),
    "text bomb": (text_bomb, "Decompressed data too large"),
    "no pixels behind the header": (lambda: png_without_pixels(40, 40), "40 x 40 PNG picture is damaged"),
}


@pytest.mark.parametrize("decoding", ["llava", "upright"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused_with_the_reason(case: str, decoding: str) -> None:
    make, reason = HOSTILE[case]
    with pytest.raises(BadImage, match=reason):
        decode(make(), decoding)


@pytest.mark.parametrize("size", [(1, 1), (64, 1), (1, 320), (800, 40)])
def test_small_pictures_of_any_shape_pass(size: tuple[int, int]) -> None:
    assert decode(encoded(noise(*size)), "upright").size == size


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_raise_nothing_but_bad_image(format: str) -> None:
    random = np.random.default_rng(0)
    data = np.frombuffer(encoded(noise(16, 16), format), dtype=np.uint8)
    refused = 0
    for _ in range(200):
        damaged = data.copy()
        damaged[random.integers(0, len(data), 3)] = random.integers(0, 256, 3)
        try:
            decode(damaged.tobytes(), "upright")
        except BadImage:
            refused += 1
    assert refused


@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (16, 16)])
def test_squash_is_one_resize_of_the_whole_picture(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(to_square(image, 16, "squash"), expected)
