"""One picture to look at: pictures of a benchmark over their questions, the model's answers and the references."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from components.benchmarks import Question
from components.benchmarks.report import Report
from components.chat_template import IMAGE_PLACEHOLDER
from components.images import decode

_COLUMNS, _SIDE, _LINE, _MARGIN = 4, 256, 17, 8


def answer_sheet(report: Report, questions: list[Question]) -> np.ndarray:
    """Questions in, the (first) picture of each with question, answer and reference out: RGB, uint8 [height, width, 3]."""
    columns = min(_COLUMNS, len(questions))
    font = ImageFont.load_default(13)
    pictures = [_scaled(decode(report.benchmark.read_image(question.images[0])), _SIDE) for question in questions]
    tallest = max(picture.height for picture in pictures)
    height = tallest + 6 * _LINE + 2 * _MARGIN
    size = (columns * (_SIDE + _MARGIN) + _MARGIN, -(-len(questions) // columns) * height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(sheet)
    for number, (question, picture) in enumerate(zip(questions, pictures, strict=True)):
        row, column = divmod(number, columns)
        left, top = _MARGIN + column * (_SIDE + _MARGIN), _MARGIN + row * height
        sheet.paste(picture, (left + (_SIDE - picture.width) // 2, top + tallest - picture.height))
        for place, (text, color) in enumerate(_lines(report, question)):
            canvas.text((left, top + tallest + 4 + place * _LINE), text, color, font)
    return np.asarray(sheet)


def _lines(report: Report, question: Question) -> list[tuple[str, str]]:
    answer = report.answers[question.id]
    lines = [(text, "black") for text in _wrap(question.prompt.replace(IMAGE_PLACEHOLDER, ""), max_lines=4)]
    if not question.reference:
        return lines + [(text, "black") for text in _wrap(f"answer: {answer}")]
    worth = report.benchmark.credit(question, answer)
    verdict = {0.0: "wrong", 1.0: "right"}.get(worth, f"worth {worth:.1f}")
    color = "firebrick" if worth == 0 else "darkgreen"
    lines += [(text, color) for text in _wrap(f"answer ({verdict}): {answer}")]
    return lines + [(text, "dimgray") for text in _wrap(f"reference: {question.reference}")]


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    factor = side / max(picture.size)
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX
    return picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))), method)


def _wrap(text: str, max_lines: int = 1) -> list[str]:
    return textwrap.wrap(text.strip(), 40, max_lines=max_lines, placeholder=" ...", break_on_hyphens=False)
