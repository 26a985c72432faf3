"""Preparation: samples become documents, ready to be packed."""

from dataclasses import asdict, dataclass, replace

import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from components.batch import IGNORE_INDEX, Document, SampleFormat
from components.chat_template import resolve_template
from components.conversation import encode_prompt, encode_within
from components.data.sources import Overrides, Sample
from components.errors import RecipeError
from components.image_modes import Decoding, SquareMode
from components.images import square
from components.turns import Turn, check_text


@dataclass(frozen=True)
class Preparation:
    """How a sample becomes a document.

    Args:
        template: Name of the conversation template; `chat_template` is the tokenizer's own.
        decoding: `llava` ignores EXIF rotation and drops alpha, `upright` rotates and composites on white.
        image_mode: `pad` to a square with the mean color, `crop` the center, or `squash` both sides.
        max_length: Most tokens of a document; whole turns are dropped from its end to fit.
        fast_images: Whether JPEGs take the fast path, which rounds otherwise than LLaVA's.
    """

    template: str
    decoding: Decoding
    image_mode: SquareMode
    max_length: int
    fast_images: bool = False

    def overridden(self, overrides: Overrides) -> "Preparation":
        """The preparation of a source that has some of it otherwise."""
        return replace(self, **{name: value for name, value in asdict(overrides).items() if value is not None})

    def document(self, sample: Sample, tokenizer: PreTrainedTokenizerBase, layout: SampleFormat) -> Document:
        """Decode the pictures, encode the conversation.

        Raises:
            BadSample: A broken picture, a placeholder mismatch, nothing supervised, or a first turn longer than `max_length`.
        """
        ids, labels, truncated = self.encode(sample.turns, len(sample.images), tokenizer, layout)
        return Document(sample.id, ids, labels, self.pixels(sample.images, layout), truncated)

    def encode(
        self, turns: list[Turn], num_images: int, tokenizer: PreTrainedTokenizerBase, layout: SampleFormat
    ) -> tuple[Int64[np.ndarray, " tokens"], Int64[np.ndarray, " tokens"], bool]:
        """Token ids and labels of a conversation, and whether its last turns were dropped to fit. No picture is needed.

        Raises:
            BadSample: A text that nothing should read, a placeholder mismatch, nothing supervised, or a first turn longer than
                `max_length`.
        """
        for turn in turns:
            check_text(turn.text)

        return encode_within(
            turns, num_images, tokenizer, self.template, layout.tokens_per_image, layout.image_token_id, self.max_length
        )

    def try_out(self, tokenizer: PreTrainedTokenizerBase, layout: SampleFormat) -> None:
        """A template that does not suit the tokenizer shows here, not in a worker at the first sample.

        Raises:
            RecipeError: Not even a question of one letter can be prepared.
        """
        shortest = Sample("x", [Turn("user", "x"), Turn("assistant", "x")], [])
        try:
            self.document(shortest, tokenizer, layout)
        except RecipeError as error:
            raise RecipeError(f"data.template = {self.template}, even for a question of one letter: {error}") from error

    def prompt(
        self, sample: Sample, tokenizer: PreTrainedTokenizerBase, layout: SampleFormat, pixels: np.ndarray | None = None
    ) -> Document:
        """A question as a document that ends where the answer begins; nothing in it is supervised.

        Args:
            sample: The question and its pictures.
            tokenizer: The model's.
            layout: What the data must know of the model.
            pixels: What `pixels` has made of the pictures before, if it has.

        Raises:
            BadSample: A broken picture or a placeholder mismatch.
        """
        ids = encode_prompt(
            sample.turns, len(sample.images), tokenizer, self.template, layout.tokens_per_image, layout.image_token_id
        )
        pixels = self.pixels(sample.images, layout) if pixels is None else pixels
        return Document(sample.id, ids, np.full_like(ids, IGNORE_INDEX), pixels)

    def end_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Id of the token that ends an answer; the tokenizer's end token where the template has none.

        Raises:
            RecipeError: The template does not suit the tokenizer, or neither of them has an end token.
        """
        end = resolve_template(self.template, tokenizer).end_token(tokenizer) or tokenizer.eos_token
        if end is None:
            raise RecipeError(f"Template {self.template} has no end token and this tokenizer no eos_token: no answer would end.")
        number = tokenizer.convert_tokens_to_ids(end)
        assert isinstance(number, int)
        return number

    def pixels(self, images: list[bytes], layout: SampleFormat) -> np.ndarray:
        """Decoded square pictures, uint8 [images, 3, size, size]."""
        squares = [
            square(image, layout.image_size, self.image_mode, layout.image_mean, self.decoding, self.fast_images)
            for image in images
        ]
        if len(squares) == 1:  # nearly always: without a copy
            return squares[0][None]
        return np.stack(squares) if squares else np.empty((0, 3, layout.image_size, layout.image_size), dtype=np.uint8)


def null_document(layout: SampleFormat, tokenizer: PreTrainedTokenizerBase, sample_id: str) -> Document:
    """A document of one token, without pictures and with nothing supervised: takes the place of a sample that cannot be used."""
    start = next((number for number in (tokenizer.bos_token_id, tokenizer.eos_token_id) if number is not None), 0)
    return Document(
        sample_id,
        np.array([start], dtype=np.int64),
        np.array([IGNORE_INDEX], dtype=np.int64),
        np.empty((0, 3, layout.image_size, layout.image_size), dtype=np.uint8),
    )
