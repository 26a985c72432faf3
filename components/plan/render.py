"""One page that shows training samples as the model reads them, with the report of a plan: HTML without anything from outside."""

import base64
import html
import io
import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from transformers import PreTrainedTokenizerBase

from components.batch import Document
from components.errors import RecipeError
from components.images import decode
from components.plan.example import CONTEXT, SUPERVISED, VISUAL, Example

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --line: #c9c9ce; --dim: #6b6b70;
  --supervised: #b9ecc4; --context: #ececf0; --visual: #bcd7fb; }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --paper: #18181b; --line: #48484e; --dim: #a0a0a8;
  --supervised: #1f6b36; --context: #303036; --visual: #24508c; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
pre, .tokens { font: 13px/1.6 ui-monospace, monospace; } pre { overflow-x: auto; }
.remark { border-left: 4px solid #d97706; padding-left: .8rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; } figcaption { color: var(--dim); max-width: 24rem; }
.seen { position: relative; width: 24rem; height: 24rem; } .seen img { width: 100%; height: 100%; image-rendering: pixelated; }
.grid { position: absolute; inset: 0; background-image: linear-gradient(to right, #fff8 1px, transparent 1px),
  linear-gradient(to bottom, #fff8 1px, transparent 1px); background-size: var(--cell) var(--cell);
  mix-blend-mode: difference; }
.tokens { white-space: pre-wrap; word-break: break-word; }
.tokens span, .key { border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 var(--paper); }
.key { padding: 1px 6px; margin-right: 1rem; }
.supervised { background: var(--supervised); } .context { background: var(--context); } .visual { background: var(--visual); }
.tokens .visual { padding: 1px 8px; }
.row { display: flex; height: 2rem; } .row div { min-width: 1px; } .row .first { border-left: 2px solid var(--ink); }
table { border-collapse: collapse; } th, td { text-align: right; padding: 2px 12px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
"""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""
_CODE = {VISUAL: "visual tokens", SUPERVISED: "supervised: what the loss is taken on", CONTEXT: "read, not supervised"}


def page(name: str, report: str, example: Example) -> str:
    """The name of a run, the report of its plan or nothing, and its example in, an HTML page out.

    Everything that comes from the recipe or the data is escaped, pictures are inside the page, and no script runs.
    """
    number = len(example.samples)
    title = "one training sample" if number == 1 else f"the first {number} training samples"
    body = [
        f"<h1>{_escape(name)}: {title}</h1>",
        *(f'<p class="remark">Not the recipe\'s own: {_escape(remark)}.</p>' for remark in example.remarks),
        *(part for place in range(number) for part in _sample(example, place)),
        "<h2>How it lies in a micro-batch</h2>" if number == 1 else "<h2>How they lie in a micro-batch</h2>",
        _packed(example),
        *(["<h2>The plan</h2>", f"<pre>{_escape(report)}</pre>"] if report else []),
    ]
    head = f'<meta charset="utf-8"><title>{_escape(name)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _sample(example: Example, place: int) -> list[str]:
    """A sample with its pictures and its tokens."""
    sample, document, preparation = example.samples[place], example.documents[place], example.preparations[place]
    layout = example.layout
    facts = (
        f"{len(document.input_ids)} tokens by the template {preparation.template}; pictures: {preparation.image_mode} to "
        f"{layout.image_size} px, {layout.tokens_per_image} visual tokens each"
    )
    several = len(example.samples) > 1
    return [
        f"<h2>{place + 1}. {_escape(sample.id)}</h2>" if several else "",
        f"<p>{'' if several else f'{_escape(sample.id)}: '}{_escape(facts)}.</p>",
        '<div class="pictures">',
        *(_pictures(data, pixels, layout.tokens_per_image) for data, pixels in zip(sample.images, document.pixels, strict=True)),
        "</div>",
        "<h3>What the model reads</h3>" if several else "<h2>What the model reads</h2>",
        "" if place else "<p>" + "".join(f'<span class="key {kind}">{text}</span>' for kind, text in _CODE.items()) + "</p>",
        f'<div class="tokens">{_tokens(example, document)}</div>',
    ]


def write(path: Path, text: str, option: str = "--page") -> None:
    """Write a page, which an option of the command names.

    Raises:
        RecipeError: It cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may hold what is no text
    except OSError as error:
        raise RecipeError(f"{option}: {path} cannot be written ({error.strerror}). Name another file.") from error


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Ids in, the text of each out, with the space that it brings; a part of a character is shown as its piece."""
    texts = []
    for place, (number, piece) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)):
        # a tokenizer leaves out the space before the first token of a text: read each after the one before it
        before = _decoded(ids[max(0, place - 1) : place], tokenizer)
        both = _decoded(ids[max(0, place - 1) : place + 1], tokenizer)
        text = both.removeprefix(before) if both.startswith(before) else _decoded([number], tokenizer)
        if not place and piece.startswith(_SPACE):
            text = f" {text}"
        texts.append(text if text and "\N{REPLACEMENT CHARACTER}" not in both else piece)
    return texts


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _tokens(example: Example, document: Document) -> str:
    parts = []
    for kind, start, end in example.spans(document):
        if kind == VISUAL:
            parts.append(f'<span class="{VISUAL}" title="positions {start} to {end - 1}">{end - start} visual tokens</span>')
            continue
        ids = document.input_ids[start:end].tolist()
        for place, (number, text) in enumerate(zip(ids, token_texts(ids, example.tokenizer), strict=True), start=start):
            shown = _escape(text).replace("\n", "↵\n")
            parts.append(f'<span class="{kind}" title="position {place}, id {number}">{shown}</span>')
    return "".join(parts)


def _packed(example: Example) -> str:
    """The row of a micro-batch, drawn to scale, and a table of its documents."""
    batch = example.batch
    strips, rows = [], []
    for document in example.documents:
        first, counts = " first", dict.fromkeys(_CODE, 0)
        for kind, start, end in example.spans(document):
            strips.append(f'<div class="{kind}{first}" style="flex:{end - start}"></div>')
            first, counts[kind] = "", counts[kind] + end - start
        cells = [len(document.input_ids), *(counts[kind] for kind in (VISUAL, SUPERVISED, CONTEXT)), len(document.pixels)]
        rows.append(f"<tr><td>{_escape(document.sample_id)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{head}</th>" for head in ("document", "tokens", "visual", "supervised", "only read", "pictures"))
    ends = ", ".join(str(end) for end in batch.cumulative_lengths.tolist())
    text = (
        f"The first {len(example.documents)} of {example.micro_batch} documents, end to end: {batch.num_tokens} tokens, unpadded. "
        f"Loss on {len(batch.targets)} positions. Attention stays between the edges {ends}."
    )
    return f'<p>{_escape(text)}</p><div class="row">{"".join(strips)}</div><table><tr>{heads}</tr>{"".join(rows)}</table>'


def _pictures(data: bytes, pixels: UInt8[np.ndarray, "3 size size"], tokens: int) -> str:
    """A picture as it is, and as the vision tower sees it, with the places of the visual tokens."""
    original = decode(data)
    caption = f"as it is: {original.width} x {original.height} px"
    original.thumbnail((640, 384))
    size, side = pixels.shape[-1], math.isqrt(tokens)
    grid = f'<div class="grid" style="--cell:{100 / side:.4f}%"></div>' if side**2 == tokens else ""
    return (
        f"<figure>{_image(original)}<figcaption>{caption}</figcaption></figure>"
        f'<figure><div class="seen">{_image(Image.fromarray(pixels.transpose(1, 2, 0)))}{grid}</div>'
        f"<figcaption>as the tower sees it: {size} x {size} px, {tokens} visual tokens</figcaption></figure>"
    )


def _image(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
