"""Pictures: bytes to RGB to a square of uint8 pixels, with limits on hostile input.

Source: the preprocessing of LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, llava/train/train.py and transformers'
CLIPImageProcessor).
"""

import io
import re
import warnings

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate

from components.errors import BadSample
from components.image_modes import Decoding, SquareMode

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000
MAX_SIDE = 16_384  # padding makes a square of the longer side: 0.8 GB at this length
MAX_ASPECT = 20
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
ASPECT_FLOOR = 16  # a shorter side below this counts as this, so that small pictures of any shape pass


_BAND = 256  # rows padded at a time
_TURNS = {
    2: (False, (3,)), 3: (False, (2, 3)), 4: (False, (2,)), 5: (True, ()), 6: (True, (3,)), 7: (True, (2, 3)), 8: (True, (2,)),
}  # fmt: skip
"""EXIF orientation: whether rows become columns, and the axes to turn around after that."""


_SCAN = b"\xff\xda"


class BadImage(BadSample):
    """A picture that cannot or must not be decoded. The message says why."""


def decode(data: bytes, decoding: Decoding = "upright", smallest: int | None = None) -> Image.Image:
    """Bytes of an encoded picture in, its first frame as RGB out.

    Args:
        data: A JPEG, PNG, WebP, GIF or BMP file, at most 32 MiB, 50 megapixels and 16384 pixels a side, at most 20 times as long
            as wide (a side below 16 pixels counts as 16), and a JPEG of at most 100 scans. Whatever the bytes, decoding and
            `to_square` need less than 1 GiB.
        decoding: `llava` does what LLaVA-1.5 did: EXIF orientation is ignored and transparency dropped. `upright` applies the
            EXIF orientation, composites transparency over white and keeps the upper 8 of 16 bits.
        smallest: Where less is enough: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep this many
            pixels.

    Raises:
        BadImage: The bytes are empty, damaged, truncated, of another format, or over a limit. JPEG has no checksum: of 200 with
            one bit of their pixels' codes flipped, 2 were refused; the others are decoded, some with wrong colors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of odd metadata and of sizes that the limits refuse
        image = _open(data)
        if smallest:
            image.draft(None, (smallest, smallest))  # formats other than JPEG know no smaller version
        return _decode(image, decoding)


def read_size(data: bytes) -> tuple[int, int]:
    """The first bytes of an encoded picture in, its width and height out: what its header says, and no pixel is decoded.

    Raises:
        BadImage: The header is damaged or does not end in these bytes, or the size is over a limit of `decode`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _open(data).size


def square(
    data: bytes,
    size: int,
    mode: SquareMode = "pad",
    fill: tuple[float, float, float] = (0.0, 0.0, 0.0),
    decoding: Decoding = "upright",
    fast: bool = False,
) -> UInt8[np.ndarray, "3 {size} {size}"]:
    """Bytes of an encoded picture in, the square of pixels a vision tower sees out.

    Args:
        data: As for `decode`.
        size: As for `to_square`; so are `mode` and `fill`.
        mode: `pad`, `crop` or `squash`.
        fill: Color of the border in [0, 1] per channel.
        decoding: As for `decode`.
        fast: Without it, the pixels are those of `to_square(decode(data))`. With it, JPEGs in RGB or gray are decoded and resized
            by torchvision and torch, which takes less than half the time; all else, and padding to more than 50 megapixels, is as
            without. The geometry is the same; the levels of photographs differ by at most 3 of 255, on average by less than 0.2.
            JPEGs at least three times as large as needed, if their sides can be divided evenly, are decoded at 1/2, 1/4 or 1/8;
            their levels differ by at most 8, on average by less than 1.

    Raises:
        BadImage: As for `decode`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        if fast and plain and not (mode == "pad" and max(image.size) ** 2 > MAX_PIXELS):
            return _fast_square(image, data, size, mode, fill, decoding)
        return to_square(_decode(image, decoding), size, mode, fill)


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
        image = _resize_padded(image, size, _levels(fill))
    image = image.resize(_resized(image.width, image.height, size, mode), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    if image.size != (size, size):
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1).copy()


def _open(data: bytes) -> Image.Image:
    """The picture with its header read and its size within the limits; no pixel is decoded yet."""
    if not data:
        raise BadImage("The picture is empty (0 bytes).")
    if len(data) > MAX_BYTES:
        raise BadImage(f"The picture has {len(data)} bytes; the limit is {MAX_BYTES} (32 MiB).")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage(f"The picture is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or it is cut off.") from error
    except Exception as error:  # hostile bytes raise nearly anything in PIL, KeyError included
        raise BadImage(f"The picture's header cannot be read: {_reason(error)}.") from error
    _check_size(*image.size)
    if image.format in ("JPEG", "MPO") and data.count(_SCAN) > MAX_SCANS:
        raise BadImage(
            f"The JPEG has {data.count(_SCAN)} scans; the limit is {MAX_SCANS}: each of them costs the time of the picture."
        )
    return image


def _decode(image: Image.Image, decoding: Decoding) -> Image.Image:
    name = f"{image.width} x {image.height} {image.format}"
    try:
        image.load()
        return _upright(image) if decoding == "upright" else _rgb(image)
    except Exception as error:
        raise BadImage(f"The {name} picture is damaged: {_reason(error)}.") from error


def _fast_square(
    image: Image.Image, data: bytes, size: int, mode: SquareMode, fill: tuple[float, float, float], decoding: Decoding
) -> UInt8[np.ndarray, "3 {size} {size}"]:
    from torchvision.io import decode_jpeg  # outside of the try: a torchvision that cannot be imported is no damage of a picture

    width, height = image.size
    scale = _fast_scale(width, height, size, mode)
    try:
        if scale > 1:  # PIL can scale while it decodes, torchvision decodes faster
            image.draft("RGB", (width // scale, height // scale))
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        else:
            pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), "RGB")
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) if decoding == "upright" else 1
    except Exception as error:
        raise BadImage(f"The {width} x {height} {image.format} picture is damaged: {_reason(error)}.") from error
    if pixels.shape != (3, height // scale, width // scale):
        raise BadImage(f"The picture's header says two sizes, {width} x {height} and {pixels.shape[2]} x {pixels.shape[1]}.")
    pixels = pixels[None]
    if turned in _TURNS:
        transposed, flipped = _TURNS[turned]
        if transposed:
            pixels, width, height = pixels.mT, height, width
        pixels = pixels.flip(flipped)
    if mode == "pad" and width != height:
        pixels, width, height = _fast_pad(pixels, _levels(fill)), max(width, height), max(width, height)
    columns, rows = _resized(width, height, size, mode)
    pixels = interpolate(pixels, size=(rows, columns), mode="bicubic", antialias=True)
    top, left = (rows - size) // 2, (columns - size) // 2
    return pixels[0, :, top : top + size, left : left + size].contiguous().numpy()


def _fast_scale(width: int, height: int, size: int, mode: SquareMode) -> int:
    """What to scale a JPEG down by while it is decoded, so that 3/2 of what is needed remain and no pixel is parted."""
    columns, rows = _resized(width, height, size, mode)
    whole = [width, height, abs(width - height) // 2 if mode == "pad" else 0]
    scales = [s for s in (8, 4, 2) if 2 * width >= 3 * s * columns and 2 * height >= 3 * s * rows and not any(n % s for n in whole)]
    return max(scales, default=1)


def _fast_pad(pixels: UInt8[torch.Tensor, "1 3 _ _"], color: tuple[int, int, int]) -> UInt8[torch.Tensor, "1 3 side side"]:
    height, width = pixels.shape[-2:]
    side = max(height, width)
    padded = np.empty((side, side, 3), dtype=np.uint8)
    padded[0] = color
    padded[1:] = padded[0]  # whole rows at a time: 60 times as fast as color by color
    top, left = (side - height) // 2, (side - width) // 2
    padded[top : top + height, left : left + width] = pixels[0].permute(1, 2, 0).numpy()
    return torch.from_numpy(padded).permute(2, 0, 1)[None]


def _resize_padded(image: Image.Image, size: int, color: tuple[int, int, int]) -> Image.Image:
    """Equal to padding to a square and resizing that, to the last bit, without the memory of the square.

    PIL resizes rows first and then columns; here the rows are padded and resized in bands.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), color)
    for first in range(0, image.height, _BAND):
        last = min(first + _BAND, image.height)
        band = Image.new("RGB", (side, last - first), color)
        band.paste(image.crop((0, first, image.width, last)), (left, 0))
        narrow.paste(band.resize((size, last - first), Image.Resampling.BICUBIC), (0, top + first))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def _levels(color: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (int(channel * 255) for channel in color)  # LLaVA truncates; rounding differs by one
    return red, green, blue


def _resized(width: int, height: int, size: int, mode: SquareMode) -> tuple[int, int]:
    """Width and height to resize a picture to, before it is cropped or padded to the square."""
    if mode == "squash":
        return size, size
    side = max(width, height) if mode == "pad" else min(width, height)
    return int(size * width / side), int(size * height / side)


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


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit gray; PIL would clip to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return _over_white(image) if image.has_transparency_data else _rgb(image)


def _over_white(image: Image.Image) -> Image.Image:
    """In bands, since whole copies of the largest picture would need half a gigabyte more."""
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, _BAND):
        band = image.crop((0, top, image.width, min(top + _BAND, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        result.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return result


def _reason(error: Exception) -> str:
    text = re.sub(r"^.*\.cpp:\d+, ", "", str(error))  # torchvision names the line of its source
    return text.strip().rstrip(".") or type(error).__name__
