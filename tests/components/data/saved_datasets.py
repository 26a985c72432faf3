"""Small datasets, written by `datasets` itself."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from components.data.sources.dataset_folder import HuggingFaceDataset

RANDOM = np.random.default_rng(0)
TEXT = datasets.Value("string")
SPOKEN = datasets.List({"from": TEXT, "value": TEXT})


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (20 * number, 50, 60)).save(file, "PNG")
    return file.getvalue()


def picture(number: int) -> dict[str, Any]:
    return {"bytes": png(number), "path": f"p{number}.png"}


def says(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def opened(path: Path | str, **options: Any) -> HuggingFaceDataset:
    source = HuggingFaceDataset(str(path), **options)
    source.setup()
    return source


def saved(folder: Path, records: list[dict[str, Any]], features: dict[str, Any]) -> HuggingFaceDataset:
    datasets.Dataset.from_list(records, features=datasets.Features(features)).save_to_disk(str(folder))
    return opened(folder)
