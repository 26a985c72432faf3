"""What a plan must know of the data: how long a sample is. A section of a recipe, so that a plan needs no data at hand."""

from dataclasses import dataclass

from components.errors import RecipeError


@dataclass(frozen=True)
class Assumptions:
    """Lengths of the mean sample, for `python main.py plan`; training takes no notice of them.

    Args:
        text_tokens: Tokens of its text, template included and visual tokens left out, >= 1; null measures the first samples of the
            data, where data and tokenizer are at hand.
        supervised_tokens: Tokens that it is trained to say, >= 1 and at most text_tokens; null measures them, or takes all of
            text_tokens where those are stated.
        images_per_sample: Pictures, >= 0; null measures them, or takes one where text_tokens is stated.

    Raises:
        RecipeError: A value out of range, or others stated without text_tokens.
    """

    text_tokens: float | None = None
    supervised_tokens: float | None = None
    images_per_sample: float | None = None

    def __post_init__(self) -> None:
        text, supervised, images = self.text_tokens, self.supervised_tokens, self.images_per_sample
        values = f"text_tokens = {text}, supervised_tokens = {supervised}, images_per_sample = {images}"
        if text is None and (supervised is not None or images is not None):
            raise RecipeError(f"plan: {values}. State text_tokens too, or none of them: then all are measured.")
        out_of_range = text is not None and (text < 1 or not 1 <= (text if supervised is None else supervised) <= text)
        if out_of_range or (images or 0) < 0:
            raise RecipeError(
                f"plan: {values}. text_tokens must be at least 1, supervised_tokens between 1 and text_tokens, "
                "images_per_sample at least 0."
            )
