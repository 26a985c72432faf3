"""Pictures: bytes to RGB to a square of uint8 pixels, with limits on hostile input.

Source: the preprocessing of LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, llava/train/train.py and transformers'
CLIPImageProcessor).
"""

import io
import warnings
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from components.errors import BadSample

Decoding = Literal["llava", "upright"]
SquareMode = Literal["pad", "crop", "squash"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000
MAX_SIDE = 16_384  # padding makes a square of the longer side: 0.8 GB at this length
MAX_ASPECT = 20
ASPECT_FLOOR = 16  # a shorter side below this counts as this, so that small pictures of any shape pass


class BadImage(BadSample):
    """A picture that cannot or must not be decoded. The message says why."""


def decode(data: bytes, decoding: Decoding = "upright") -> Image.Image:
    """Bytes of an encoded picture in, its first frame as RGB out.

    Args:
        data: A JPEG, PNG, WebP, GIF or BMP file, at most 32 MiB, 50 megapixels and 16384 pixels a side, at most 20 times as long
            as wide (a side below 16 pixels counts as 16).
        decoding: `llava` does what LLaVA-1.5 did: EXIF orientation is ignored and transparency dropped. `upright` applies the
            EXIF orientation, composites transparency over white and keeps the upper 8 of 16 bits.

    Raises:
        BadImage: The bytes are empty, damaged, truncated, of another format, or over a limit.
    """
    if not data:
        raise BadImage("The picture is empty (0 bytes).")
    if len(data) > MAX_BYTES:
        raise BadImage(f"The picture has {len(data)} bytes; the limit is {MAX_BYTES} (32 MiB).")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of odd metadata and of sizes that the limits below refuse
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise BadImage(f"The picture is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or it is cut off.") from error
        except Exception as error:  # hostile bytes raise nearly anything in PIL, KeyError included
            raise BadImage(f"The picture's header cannot be read: {_reason(error)}.") from error
        _check_size(*image.size)
        try:
            image.load()
            return _upright(image) if decoding == "upright" else image.convert("RGB")
        except Exception as error:
            raise BadImage(f"The {image.width} x {image.height} {image.format} picture is damaged: {_reason(error)}.") from error


def to_square(
    image: Image.Image, size: int, mode: SquareMode = "pad", fill: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> UInt8[np.ndarray, "3 {size} {size}"]:
    """An RGB picture in, the square of pixels a vision tower sees out; padded and cropped equal to LLaVA-1.5's to the last bit.

    Args:
        image: Picture in RGB.
        size: Side of the square, in pixels, at least 1.
        mode: `pad` centers the whole picture on a square of the fill color; `crop` keeps the central square; `squash`
            (open_clip's word) resizes both sides alone, so that all of a long picture is seen large.
        fill: Color of the border in [0, 1] per channel: the mean of the tower's preprocessing. Used by `pad` alone.
    """
    if mode == "pad" and image.width != image.height:
        image = _pad_to_square(image, tuple(int(channel * 255) for channel in fill))  # LLaVA truncates; rounding differs by one
    if mode == "squash" and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    width, height = image.size
    shorter = min(width, height)
    if shorter != size:
        image = image.resize((int(size * width / shorter), int(size * height / shorter)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    if image.size != (size, size):
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1).copy()


def _pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _check_size(width: int, height: int) -> None:
    shorter, longer = sorted((width, height))
    if shorter < 1:
        raise BadImage(f"The picture is {width} x {height} pixels: it has no pixels.")
    if width * height > MAX_PIXELS:
        raise BadImage(f"The picture is {width} x {height} pixels; the limit is {MAX_PIXELS // 10**6} megapixels.")
    if longer > MAX_SIDE:
        raise BadImage(f"The picture is {width} x {height} pixels; the limit is {MAX_SIDE} a side.")
    if longer > MAX_ASPECT * max(shorter, ASPECT_FLOOR):
        raise BadImage(f"The picture is {width} x {height} pixels; at most {MAX_ASPECT} times as long as wide is allowed.")


def _upright(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray; PIL would clip to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
