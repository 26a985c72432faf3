"""What a validation gives: a table for the console, pictures for TensorBoard, files for the run folder."""

import hashlib
import json
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from components.benchmarks import Benchmark, Question, normalize, text_only_best
from components.conversation import IMAGE_PLACEHOLDER
from components.data import Preparation
from components.images import decode

_PACKAGES = ("torch", "transformers", "lightning", "numpy", "pillow")


@dataclass(frozen=True)
class Result:
    """One benchmark's answers at one step in; metrics, a table and files out.

    Args:
        name: Name of the benchmark in the recipe.
        step: Optimizer step of the weights.
        benchmark: The benchmark.
        asked: Questions that were asked.
        answers: The model's answers, by id.
        exchanged: The same questions with other pictures, if they were asked too.
        exchanged_answers: The answers to those.
    """

    name: str
    step: int
    benchmark: Benchmark
    asked: list[Question]
    answers: dict[str, str]
    exchanged: list[Question] | None = None
    exchanged_answers: dict[str, str] | None = None

    @property
    def partial(self) -> bool:
        """Whether fewer questions were asked than there are."""
        return len(self.asked) < len(self.benchmark.questions())

    @property
    def shown_name(self) -> str:
        """The name in the log, in the table and of the files; never that of a full result when it is partial."""
        return f"{self.name}_partial" if self.partial else self.name

    @cached_property
    def metrics(self) -> dict[str, float]:
        """What the answers score."""
        return self.benchmark.score(self.answers)

    @cached_property
    def text_only_best(self) -> dict[str, float]:
        """What the best answers without pictures score on the questions that were asked."""
        return text_only_best(self.asked)

    @cached_property
    def exchanged_metrics(self) -> dict[str, float]:
        """What the answers to the exchanged pictures score; empty if these were not asked."""
        return self.benchmark.score(self.exchanged_answers) if self.exchanged_answers else {}

    def logged(self) -> dict[str, float]:
        """Every metric by its tag."""
        values = {f"{self.shown_name}/{key}": value for key, value in self.metrics.items()}
        if self.exchanged_metrics:
            values[f"{self.shown_name}/accuracy_shuffled_pictures"] = self.exchanged_metrics["accuracy"]
        return values

    def table(self) -> str:
        """A title and one row for each group and for all questions."""
        columns = {"accuracy": self.metrics, "text-only best": self.text_only_best, "shuffled pictures": self.exchanged_metrics}
        columns = {title: values for title, values in columns.items() if values}
        counts = Counter(question.group for question in self.asked if question.group)
        rows = [(group, counts[group], f"accuracy/{group}") for group in counts] + [("all", len(self.asked), "accuracy")]
        width = max(len(name) for name, _, _ in rows)
        how_many = f"{len(self.asked)} of {len(self.benchmark.questions())} questions, " if self.partial else ""
        lines = [f"{self.shown_name} at step {self.step}: {how_many}{self.benchmark.describe()}"]
        lines.append("  ".join([" " * width, "questions", *columns]))
        for name, count, key in rows:
            numbers = [f"{values[key]:{len(title)}.3f}" for title, values in columns.items()]
            lines.append("  ".join([f"{name:{width}}", f"{count:9}", *numbers]))
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, recipe: Path, preparation: Preparation, max_new_tokens: int) -> None:
        """The answers, the metrics with everything they depend on, and the table, into three files.

        Args:
            folder: Where they go.
            recipe: The resolved recipe of the run or checkpoint that answered; there may be none outside of the command line.
            preparation: How the questions became prompts.
            max_new_tokens: Longest answer, in tokens.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.shown_name}_step_{self.step}"
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows())
        folder.joinpath(f"{name}.jsonl").write_text(rows, encoding="utf-8", errors="replace")
        prompts = "\0".join([preparation.template, *(question.prompt for question in self.asked)])
        record = {
            "benchmark": self.name,
            "description": self.benchmark.describe(),
            "fingerprint": self.benchmark.fingerprint(),
            "step": self.step,
            "partial": self.partial,
            "questions_asked": len(self.asked),
            "questions": len(self.benchmark.questions()),
            "metrics": self.metrics,
            "text_only_best": self.text_only_best,
            **({"shuffled_pictures": self.exchanged_metrics} if self.exchanged_metrics else {}),
            "recipe_hash": _hash(recipe.read_bytes()) if recipe.is_file() else None,
            "template": preparation.template,
            "decoding": preparation.decoding,
            "image_mode": preparation.image_mode,
            "prompt_hash": _hash(prompts.encode(errors="replace")),
            "max_new_tokens": max_new_tokens,
            "versions": {package: version(package) for package in _PACKAGES},
        }
        folder.joinpath(f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        folder.joinpath(f"{name}.txt").write_text(self.table(), encoding="utf-8")

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for number, question in enumerate(self.asked):
            row = asdict(question) | {"answer": self.answers[question.id]}
            if self.exchanged and self.exchanged_answers:
                row["shuffled_images"] = self.exchanged[number].images
                row["shuffled_answer"] = self.exchanged_answers[question.id]
            rows.append(row)
        return rows


def answer_sheet(benchmark: Benchmark, questions: list[Question], answers: dict[str, str]) -> np.ndarray:
    """One picture to look at: the (first) pictures of the questions, four in a row, over question, answer and reference."""
    columns, side, line, margin = min(4, len(questions)), 256, 17, 8
    font = ImageFont.load_default(13)
    pictures = [_scaled(decode(benchmark.read_image(question.images[0])), side) for question in questions]
    tallest = max(picture.height for picture in pictures)
    height = tallest + 6 * line + 2 * margin
    sheet = Image.new("RGB", (columns * (side + margin) + margin, -(-len(questions) // columns) * height + margin), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, (question, picture) in enumerate(zip(questions, pictures, strict=True)):
        row, column = divmod(number, columns)
        left, top = margin + column * (side + margin), margin + row * height
        sheet.paste(picture, (left + (side - picture.width) // 2, top + tallest - picture.height))
        answer = answers[question.id]
        right = normalize(answer) == normalize(question.reference)
        lines = [(text, "black") for text in _wrap(question.prompt.replace(IMAGE_PLACEHOLDER, ""), max_lines=4)]
        lines += [
            (text, "darkgreen" if right else "firebrick") for text in _wrap(f"answer ({'right' if right else 'wrong'}): {answer}")
        ]
        lines += [(text, "dimgray") for text in _wrap(f"reference: {question.reference}")]
        for place, (text, color) in enumerate(lines):
            canvas.text((left, top + tallest + 4 + place * line), text, color, font)
    return np.asarray(sheet)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    factor = side / max(picture.size)
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX
    return picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))), method)


def _wrap(text: str, max_lines: int = 1) -> list[str]:
    return textwrap.wrap(text.strip(), 40, max_lines=max_lines, placeholder=" ...", break_on_hyphens=False)
