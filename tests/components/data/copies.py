"""Pictures of an evaluation, and copies of them as training data hold them."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.natural_pictures import crop, texture

FIELDS = [texture(np.random.default_rng(number), 256) for number in range(12)]


def photograph(number: int) -> Image.Image:
    return crop(FIELDS[number], 200, 150 + 5 * number, np.random.default_rng(number))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(number: int, quality: int = 90) -> bytes:
    return encoded(photograph(number), quality=quality)


def small(number: int) -> bytes:
    """A smaller, compressed copy in gray."""
    image = photograph(number).convert("L")
    return encoded(image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC), quality=60)


def write_evaluation(folder: Path) -> Path:
    """Pictures 0 to 4 in folders and 5 to 6 in an archive, and two broken ones."""
    (folder / "artwork").mkdir(parents=True)
    for number in range(3):
        (folder / "artwork" / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / "3.PNG").write_bytes(encoded(photograph(3), "PNG"))
    (folder / "4.webp").write_bytes(encoded(photograph(4), "WEBP"))
    (folder / "questions.json").write_text("[]")
    (folder / "broken.jpg").write_bytes(jpeg(9)[:1000])
    with zipfile.ZipFile(folder / "val.zip", "w") as archive:
        archive.writestr("val/5.jpg", jpeg(5))
        archive.writestr("val/6.jpg", jpeg(6))
        archive.writestr("__MACOSX/val/._5.jpg", b"not a picture")
        archive.writestr("val/empty.jpg", b"")
    return folder
