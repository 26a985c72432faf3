"""Which copies of a picture decontamination finds, what it finds among others, and how fast.

python -m tests.benchmarks decontamination [FOLDER]

FOLDER holds photographs to copy (.jpg and .png files); without it, pictures with the spectrum of photographs are drawn.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from components.images import decode
from components.perceptual_hash import HashTable, perceptual_hash, picture_gray, same_picture, small_gray
from tests.natural_pictures import crop, jpegs, texture

DISTANCES = (2, 4, 6, 8, 10)
BICUBIC = Image.Resampling.BICUBIC


def recompressed(quality: int) -> Callable[[Image.Image], Image.Image]:
    def copy(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return decode(file.getvalue())

    return copy


def resized(scale: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize((round(image.width * scale), round(image.height * scale)), BICUBIC)


def cropped(share: float) -> Callable[[Image.Image], Image.Image]:
    """A share of each side is cut off, half of it at either end."""

    def copy(image: Image.Image) -> Image.Image:
        across, down = round(image.width * share / 2), round(image.height * share / 2)
        return image.crop((across, down, image.width - across, image.height - down))

    return copy


COPIES = {
    "quality 95": recompressed(95),
    "quality 75": recompressed(75),
    "quality 50": recompressed(50),
    "half size": resized(0.5),
    "half size, quality 75": lambda image: recompressed(75)(resized(0.5)(image)),
    "double size": resized(2),
    "squashed to a square": lambda image: image.resize((256, 256), BICUBIC),
    "gray": lambda image: image.convert("L"),
    "20 % brighter": lambda image: Image.fromarray(np.clip(np.asarray(image) * 1.2, 0, 255).astype(np.uint8)),
    "1 % cut off": cropped(0.01),
    "2 % cut off": cropped(0.02),
    "5 % cut off": cropped(0.05),
    "10 % cut off": cropped(0.1),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def bits(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.bitwise_count(left ^ right)


def copies(images: list[Image.Image]) -> None:
    grays = np.stack([small_gray(image) for image in images])
    hashes = perceptual_hash(grays)
    print(f"\nShare of {len(images)} pictures found among their copies, by the distance allowed, and confirmed by correlation")
    print(f"{'':24}" + "".join(f"{distance:>8}" for distance in DISTANCES) + f"{'largest':>10}")
    for name, copy in COPIES.items():
        others = np.stack([small_gray(copy(image)) for image in images])
        distance, alike = bits(hashes, perceptual_hash(others)), same_picture(grays, others)
        shares = "".join(f"{((distance <= most) & alike).mean():8.3f}" for most in DISTANCES)
        print(f"{name:24}{shares}{distance.max():>10}")


def others(first: int, second: int) -> None:
    """Unrelated pictures: fields of one spectrum, as small as they are hashed."""
    random = np.random.default_rng(0)

    def fields(count: int) -> np.ndarray:
        frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None])
        frequency[0, 0] = np.inf
        drawn = np.fft.irfft2(np.fft.rfft2(random.standard_normal((count, 64, 64))) / frequency)[:, :32, :32]
        return np.clip(128 + 50 * drawn / drawn.std((1, 2), keepdims=True), 0, 255).astype(np.uint8)

    left, right = fields(first), fields(second)
    query, found, distance = HashTable(perceptual_hash(left), 12).search(perceptual_hash(right))
    alike = same_picture(left[found], right[query])
    print(f"\nPairs found among {first * second:,} of unrelated pictures; after the correlation")
    for most in (4, 6, 8, 10, 12):
        print(f"{most:>4} bits {(distance <= most).sum():>6} {((distance <= most) & alike).sum():>6}")


def look_ups(evaluation: int, training: int) -> None:
    random = np.random.default_rng(0)

    def hashes(count: int) -> np.ndarray:
        """Half of the bits are set, as in hashes of pictures."""
        return np.packbits(np.argsort(random.random((count, 64)), axis=1) < 32, axis=1).view(">u8")[:, 0].astype(np.uint64)

    known, asked = hashes(evaluation), hashes(training)
    print(f"\nLook-ups a core-second among {evaluation:,} hashes, and core-hours for 600 million")
    for distance in (0, 4, 6, 8, 10, 12):
        table, start = HashTable(known, distance), time.process_time()
        table.search(asked)
        rate = training / (time.process_time() - start)
        print(f"{distance:>4} bits {rate:>12,.0f} {600e6 / rate / 3600:>8.1f}")
    start = time.process_time()
    for query in asked[:500]:
        np.flatnonzero(bits(query, known) <= 8)
    rate = 500 / (time.process_time() - start)
    print(f"all pairs {rate:>11,.0f} {600e6 / rate / 3600:>8.1f}")


def hashing() -> None:
    print("\nPictures hashed a core-second, and bits in which the hash differs from that of the whole picture")
    for name, sides, count in (("300-500 px", (300, 500), 100), ("480-640 px", (480, 640), 50), ("1000-2000 px", (1000, 2000), 12)):
        files = jpegs(count, sides)
        start = time.process_time()
        whole = perceptual_hash(np.stack([small_gray(decode(file)) for file in files]))
        between = time.process_time()
        ours = perceptual_hash(np.stack([picture_gray(file) for file in files]))
        end = time.process_time()
        differing = bits(whole, ours)
        print(
            f"{name:14}{count / (end - between):8.0f} (whole: {count / (between - start):.0f}), "
            f"mean {differing.mean():.2f}, largest {differing.max()}"
        )


def main(argv: list[str]) -> None:
    if argv:
        files = sorted(path for path in Path(argv[0]).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        images = [decode(path.read_bytes()) for path in files[:: max(1, len(files) // 300)]]
    else:
        random = np.random.default_rng(0)
        images = [crop(texture(random, 512), *(int(side) for side in random.integers(300, 501, 2)), random) for _ in range(100)]
    copies(images)
    others(10_000, 20_000)
    look_ups(50_000, 20_000)
    hashing()
