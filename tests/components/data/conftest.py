"""Small annotation files with pictures, as users have them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Write = Callable[[str, list[dict[str, Any]]], str]


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """A folder with p0.png to p9.png, each of another size and color."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        buffer = io.BytesIO()
        Image.new("RGB", (20 + number, 16), (25 * number, 100, 200 - 20 * number)).save(buffer, "PNG")
        (folder / f"p{number}.png").write_bytes(buffer.getvalue())
    return str(folder)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes records into a .json or .jsonl file and returns its path."""

    def write(name: str, records: list[dict[str, Any]]) -> str:
        file = tmp_path / name
        text = json.dumps(records, indent=1) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in records)
        file.write_text(text)
        return str(file)

    return write
