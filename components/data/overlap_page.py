"""One page that shows training pictures beside those of evaluations that they overlap with: HTML without anything from outside."""

import base64
import html
import io
from collections.abc import Iterable
from typing import NamedTuple

from components.errors import BadSample
from components.images import decode

_SIDE = 256
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } td { padding: .5rem 1rem .5rem 0; vertical-align: top; max-width: 20rem; overflow-wrap: anywhere; }
img { display: block; max-width: 16rem; max-height: 16rem; }
"""


class SideBySide(NamedTuple):
    """Two pictures side by side.

    Args:
        training: Where the training picture stands.
        evaluation: Where the evaluation's stands.
        verdict: How near they are.
        left: The training picture, encoded.
        right: The evaluation's, encoded.
    """

    training: str
    evaluation: str
    verdict: str
    left: bytes
    right: bytes


def page(summary: list[str], pairs: Iterable[SideBySide]) -> str:
    """Lines of text and pairs in, an HTML page out. Text is escaped, pictures are inside the page, and no script runs."""
    head = f'<meta charset="utf-8"><title>Overlaps</title><style>{_STYLE}</style>'
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in summary)
    rows = "".join(_row(pair) for pair in pairs)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        f"<h1>Training pictures that evaluations ask about</h1>\n{lines}\n"
        f"<table><tr><th>training</th><th>evaluation</th><th></th></tr>\n{rows}</table>\n</body></html>\n"
    )


def _row(pair: SideBySide) -> str:
    cells = [
        f"{_image(pair.left)}{html.escape(pair.training)}",
        f"{_image(pair.right)}{html.escape(pair.evaluation)}",
        html.escape(pair.verdict),
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _image(data: bytes) -> str:
    try:
        image = decode(data)
    except BadSample as error:  # equal bytes may be equally broken
        return f"<em>{html.escape(str(error))}</em>"
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
