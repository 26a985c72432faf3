"""Memory that one picture can take, whatever its bytes: 1 GiB at most, as `components.images.decode` states."""

import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from components.images import BadImage, square
from tests.components.test_images import encoded, png_chunk, png_header, text_bomb

BOUND = 1024  # MiB, for the largest picture
SMALL = 128  # MiB, for what is refused or needs no more than its strip
LARGE = (7064, 7072)  # 49.96 megapixels, whose padded square the fast path still makes itself


def memory(field: str) -> float:
    """A line of /proc/self/status, in MiB."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE).group(1)) / 1024


def in_a_child(work: Callable[[], bytes]) -> bytes:
    """What work returns, from a process of its own, so that nothing it freed is left to be used again."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)
                Path(file.name).write_bytes(work())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return Path(file.name).read_bytes()


def needed(make: Callable[[], bytes], decoding: str, fast: bool) -> tuple[float, str]:
    """MiB at the peak, and the reason of a refusal."""
    data = in_a_child(make)

    def work() -> bytes:
        before, reason = memory("VmRSS"), ""
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the parent's
        try:
            square(data, 336, "pad", decoding=decoding, fast=fast)
        except BadImage as error:
            reason = str(error)
        return struct.pack("d", memory("VmHWM") - before) + reason.encode()

    answer = in_a_child(work)
    return struct.unpack("d", answer[:8])[0], answer[8:].decode()


def png(width: int, height: int, color: int = 2, depth: int = 8, pixel_bytes: int = 3) -> bytes:
    """A PNG of zeros that is all there."""
    compressor = zlib.compressobj(1)
    row = bytes(1 + width * pixel_bytes)
    pixels = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return header + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def animation() -> bytes:
    frames = [Image.new("P", (800, 600), number) for number in range(50)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


QUICK = {
    "bomb header": (lambda: png_header(20_000, 20_000) + png_chunk(b"IDAT", b""), "exceeds limit"),
    "real bomb": (lambda: png(12_000, 12_000), "the limit is 50 megapixels"),
    "text bomb": (text_bomb, "Decompressed data too large"),
    "long exif": (lambda: encoded(Image.new("RGB", (32, 32)), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(3_600_000)), ""),
    "animation": (animation, ""),
    "longest strip": (lambda: encoded(Image.new("RGB", (16_384, 820)), "JPEG"), ""),
}
"""Bytes that would take gigabytes without limits, and what refuses them."""


@pytest.mark.parametrize("case", QUICK)
def test_bombs_and_strips_take_little(case: str) -> None:
    make, reason = QUICK[case]
    peak, refused = needed(make, "upright", fast=True)
    assert peak < SMALL
    assert bool(refused) == bool(reason) and reason in refused


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (7069, 7069)), "JPEG", exif=exif)


LARGEST = {
    "JPEG": lambda: encoded(Image.new("RGB", LARGE), "JPEG"),
    "odd JPEG": lambda: encoded(Image.new("RGB", (7069, 7070)), "JPEG"),
    "progressive JPEG": lambda: encoded(Image.new("RGB", (7069, 7070)), "JPEG", progressive=True, subsampling=0),
    "progressive CMYK": lambda: encoded(Image.new("CMYK", LARGE), "JPEG", progressive=True, subsampling=0),
    "turned JPEG": turned,
    "PNG with alpha": lambda: png(*LARGE, color=6, pixel_bytes=4),
    "PNG of 16 bits": lambda: png(*LARGE, color=6, depth=16, pixel_bytes=8),
    "gray PNG of 16 bits": lambda: png(*LARGE, color=0, depth=16, pixel_bytes=2),
    "GIF": lambda: encoded(Image.new("P", LARGE), "GIF", transparency=0),
    "WebP with alpha": lambda: encoded(Image.new("RGBA", LARGE, (1, 2, 3, 100)), "WEBP", lossless=True, method=0, quality=0),
    "tall strip": lambda: encoded(Image.new("RGB", (820, 16_384)), "JPEG"),
}
"""The largest pictures that are not refused."""


@pytest.mark.slow
@pytest.mark.parametrize("decoding", ["llava", "upright"])
@pytest.mark.parametrize("case", LARGEST)
def test_the_largest_pictures_stay_below_the_bound(case: str, decoding: str, capsys: pytest.CaptureFixture[str]) -> None:
    for fast in (False, True) if "JPEG" in case or case == "tall strip" else (False,):  # all else takes the exact path
        peak, refused = needed(LARGEST[case], decoding, fast)
        with capsys.disabled():
            print(f"\n{case}, {decoding}, {'fast' if fast else 'exact'}: {peak:.0f} MiB")
        assert refused == ""
        assert peak < BOUND
