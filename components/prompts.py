"""Prompts for generation: padded on the left, and what questions about the same pictures have in common."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from components.batch import IMAGE_TOKEN_ID, Document


def left_padded(
    prompts: list[Document], fuse: Callable[[list[Document]], Float[Tensor, "tokens embed_dim"]]
) -> tuple[Float[Tensor, "prompts length embed_dim"], Int64[Tensor, "prompts length"], list[tuple[int, int]]]:
    """Prompts in; their embeddings, padded on the left, the mask, and their beginnings as `Decoder.generate` takes them out.

    Args:
        prompts: Tokenized prompts with their pictures. The same pictures are looked at once.
        fuse: Documents to the embeddings of their tokens, end to end.
    """
    beginnings = shared_beginnings(prompts)
    parts = [
        prompt if first == number else _after(prompt, length)
        for number, (prompt, (first, length)) in enumerate(zip(prompts, beginnings, strict=True))
    ]
    rows = list(fuse(parts).split([len(part.input_ids) for part in parts]))
    for number, (first, length) in enumerate(beginnings):
        if first != number:
            rows[number] = torch.cat([rows[first][:length], rows[number]])
    masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    embeds, mask = (pad_sequence(one, batch_first=True, padding_side="left") for one in (rows, masks))
    return embeds, mask, beginnings


def shared_beginnings(prompts: list[Document]) -> list[tuple[int, int]]:
    """Prompts in; for each the number of the first that begins like it, perhaps its own, and how many tokens they share.

    A beginning ends with the last picture: the text before it and all pictures are the same. A prompt without a picture, or that
    ends with one, shares nothing.
    """
    firsts: dict[tuple[bytes, bytes], int] = {}
    found = []
    for number, prompt in enumerate(prompts):
        slots = np.flatnonzero(prompt.input_ids == IMAGE_TOKEN_ID)
        length = int(slots[-1]) + 1 if len(slots) else 0
        if 0 < length < len(prompt.input_ids):
            beginning = prompt.input_ids[:length].tobytes(), prompt.pixels.tobytes()
            found.append((firsts.setdefault(beginning, number), length))
        else:
            found.append((number, 0))
    return found


def _after(prompt: Document, length: int) -> Document:
    return replace(prompt, input_ids=prompt.input_ids[length:], labels=prompt.labels[length:], pixels=prompt.pixels[:0])
