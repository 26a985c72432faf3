"""Pictures with the spectrum of natural ones, for speeds and differences that hold for photographs.

Source: amplitudes of natural pictures fall as a power of the frequency (Field 1987, J. Opt. Soc. Am. A 4, 2379). With the
exponent 1.5 the JPEGs are as large as crops of photographs: 34 KB at 300 to 500 pixels a side.
"""

import io

import numpy as np
from PIL import Image


def texture(random: np.random.Generator, side: int = 1024) -> np.ndarray:
    """A smooth random field of side x side x 3 uint8, its channels alike as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    fields = [np.fft.irfft2(np.fft.rfft2(random.standard_normal((side, side))) / frequency**1.5) for _ in range(3)]
    gray, *colors = [field / field.std() for field in fields]
    mixed = [gray + 0.2 * colors[0], gray, gray + 0.2 * colors[1]]
    return np.stack([np.clip(128 + 60 * field, 0, 255) for field in mixed], axis=-1).astype(np.uint8)


def crop(field: np.ndarray, width: int, height: int, random: np.random.Generator) -> Image.Image:
    """A random part of a field."""
    top, left = (int(random.integers(0, whole - part + 1)) for whole, part in zip(field.shape, (height, width), strict=False))
    return Image.fromarray(field[top : top + height, left : left + width])


def jpegs(count: int, sides: tuple[int, int], seed: int = 0) -> list[bytes]:
    """JPEGs as the web has them: 85 % with halved colors, 10 % progressive, qualities 75 to 95."""
    random = np.random.default_rng(seed)
    fields = [texture(random, max(1024, sides[1])) for _ in range(2)]
    files = []
    for number in range(count):
        width, height = (int(side) for side in random.integers(sides[0], sides[1] + 1, 2))
        file = io.BytesIO()
        crop(fields[number % len(fields)], width, height, random).save(
            file,
            "JPEG",
            quality=int(random.integers(75, 96)),
            subsampling="4:2:0" if random.random() < 0.85 else "4:4:4",
            progressive=bool(random.random() < 0.1),
        )
        files.append(file.getvalue())
    return files
