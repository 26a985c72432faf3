"""Samples with the lengths of captions and of instructions, random in everything else.

Lengths are modelled: lognormal answers; captions after a prompt of 4 tokens, instructions after prompts as those of LLaVA's mix.
"""

from typing import Literal

import numpy as np

from components.batch import IGNORE_INDEX, Document, SampleFormat

Kind = Literal["captions", "instructions"]
PROMPTS = {"captions": (4,), "instructions": (30, 45, 60, 120, 250)}
"""Lengths of a prompt, each as likely as the others, in tokens."""
ANSWERS = {"captions": (24, 0.6, 6, 120), "instructions": (110, 0.9, 8, 700)}
"""Median and sigma of an answer's tokens, and the fewest and most of them."""
BEGIN, END, FIRST_WORD = 1, 2, 3


def documents(kind: Kind, samples: int, layout: SampleFormat, vocab_size: int, seed: int) -> list[Document]:
    """Samples of one picture, a prompt and an answer, which is supervised with the end token.

    No sample holds the last id of the vocabulary: layouts whose image token has an embedding row can use that one.
    """
    random = np.random.default_rng(seed)
    median, sigma, fewest, most = ANSWERS[kind]
    made = []
    for number in range(samples):
        prompt = int(random.choice(PROMPTS[kind]))
        answer = int(np.clip(random.lognormal(np.log(median), sigma), fewest, most))
        words = random.integers(FIRST_WORD, vocab_size - 1, prompt + answer)
        input_ids = np.concatenate([[BEGIN], [layout.image_token_id] * layout.tokens_per_image, words, [END]])
        labels = input_ids.copy()
        labels[: -answer - 1] = IGNORE_INDEX
        pixels = random.integers(0, 256, (1, 3, layout.image_size, layout.image_size), dtype=np.uint8)
        made.append(Document(f"{kind} {seed}.{number}", input_ids, labels, pixels))
    return made
