"""What a validation gives: a table for the console, pictures for TensorBoard, files for the run folder."""

import json
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from components.benchmarks import Benchmark, Question, normalize
from components.conversation import IMAGE_PLACEHOLDER
from components.images import decode


@dataclass
class Result:
    """What one validation of one benchmark gave."""

    name: str
    title: str
    step: int
    counts: Counter[str]
    metrics: dict[str, float]
    text_only: dict[str, float]
    shuffled: dict[str, float]

    def table(self) -> str:
        """A title and one row for each group and for all questions."""
        columns = {"accuracy": self.metrics, "text-only best": self.text_only, "shuffled pictures": self.shuffled}
        columns = {title: values for title, values in columns.items() if values}
        keys = [*(key for key in self.counts if key != "accuracy"), "accuracy"]
        names = {key: key.removeprefix("accuracy/") if key != "accuracy" else "all" for key in keys}
        width = max(map(len, names.values()))
        lines = [f"{self.name} at step {self.step}: {self.title}", "  ".join([" " * width, "questions", *columns])]
        for key in keys:
            numbers = [f"{values[key]:{len(title)}.3f}" for title, values in columns.items()]
            lines.append("  ".join([f"{names[key]:{width}}", f"{self.counts[key]:9}", *numbers]))
        return "\n".join(lines)

    def write(self, folder: Path, provenance: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """The answers, the metrics with all that they depend on, and the table, into three files."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}_step_{self.step}"
        file.with_suffix(".jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        record = {
            "name": self.name,
            "step": self.step,
            "metrics": self.metrics,
            "counts": self.counts,
            "text_only_best": self.text_only,
        }
        record |= {"shuffled_pictures": self.shuffled} if self.shuffled else {}
        file.with_suffix(".json").write_text(json.dumps(record | provenance, indent=2) + "\n", encoding="utf-8")
        file.with_suffix(".txt").write_text(self.table() + "\n", encoding="utf-8")


def answer_sheet(benchmark: Benchmark, questions: list[Question], answers: dict[str, str]) -> np.ndarray:
    """One picture to look at: the pictures of the questions, four in a row, over question, answer and reference."""
    columns, side, line, margin = min(4, len(questions)), 256, 17, 8
    font = ImageFont.load_default(13)
    height = side + 6 * line + 2 * margin
    sheet = Image.new("RGB", (columns * (side + margin) + margin, -(-len(questions) // columns) * height + margin), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, question in enumerate(questions):
        row, column = divmod(number, columns)
        left, top = margin + column * (side + margin), margin + row * height
        picture = decode(benchmark.read_image(question.images[0]))
        factor = side / max(picture.size)
        method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX
        picture = picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))), method)
        sheet.paste(picture, (left + (side - picture.width) // 2, top + side - picture.height))
        right = normalize(answers[question.id]) == normalize(question.reference)
        asked = " ".join(question.prompt.replace(IMAGE_PLACEHOLDER, "").split())
        lines = [(text, "black") for text in textwrap.wrap(asked, 40, max_lines=4, placeholder=" ...")]
        lines.append(
            (_shorten(f"answer ({'right' if right else 'wrong'}): {answers[question.id]}"), "darkgreen" if right else "firebrick")
        )
        lines.append((_shorten(f"reference: {question.reference}"), "dimgray"))
        for place, (text, color) in enumerate(lines):
            canvas.text((left, top + side + 4 + place * line), text, color, font)
    return np.asarray(sheet)


def _shorten(text: str) -> str:
    return textwrap.shorten(text, 40, placeholder=" ...")
