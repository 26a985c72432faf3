"""Token ids of the pieces of a row, whatever the tokenizer does at the start of a text."""

from functools import lru_cache
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer; its own chat template needs more of it."""

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Texts of `bos_token` and `eos_token`, as far as the tokenizer has them."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text."""

    def __hash__(self) -> int:
        """A key for what is known of the tokenizer."""


_LONG = 256  # characters; longer texts seldom come again, and thousands of them would fill a worker's memory


def ids_of(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text. Short ones are cached: the words of a template, and often questions, come again in every sample."""
    return _cached_ids(tokenizer, text) if len(text) <= _LONG else tuple(tokenizer.encode(text, add_special_tokens=False))


@lru_cache(maxsize=2**8)  # answers pass through it, and long-lived small objects between short-lived large ones scatter a heap
def _cached_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()


def ids_at_start(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text at the start of a row or after a picture. There sentencepiece puts one more space before any text."""
    return ids_of(tokenizer, f" {text}" if text and _adds_space_unless_there(tokenizer) else text)


def ids_continuing(tokenizer: Tokenizer, text: str, before: str) -> tuple[int, ...]:
    """Ids of a text that stands after another, whose own ids stay as they are.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        before: What it continues, or the end of that.
    """
    for context in (before, "\n", ""):  # a text may melt into the one before it: "]" and "." are one token of LLaMA
        start, both = ids_of(tokenizer, context), ids_of(tokenizer, context + text)
        if both[: len(start)] == start:
            return both[len(start) :]
    raise AssertionError("nothing melts into an empty text")


@lru_cache(maxsize=8)
def _adds_space_unless_there(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a space before every text that begins with none, as transformers' LLaMA does."""
    return ids_of(tokenizer, " x") == ids_of(tokenizer, "x")
