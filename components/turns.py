"""Turns of a conversation, and how a record of a LLaVA file becomes turns.

Source: LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, llava/train/train.py).
"""

from dataclasses import dataclass
from typing import Any, Literal

from components.chat_template import IMAGE_PLACEHOLDER
from components.errors import BadSample

MAX_CHARACTERS = 100_000
"""Of one turn, or of a caption: longer texts are not what they seem, and would hold up the tokenizer."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Args:
        role: Who speaks.
        text: What is said; `<image>` in a user's turn stands for one picture.
    """

    role: Literal["user", "assistant"]
    text: str


def check_text(text: str) -> None:
    """A text that no model should read is refused before it is tokenized.

    Raises:
        BadSample: It has more than 100,000 characters, a NUL character, or half of a surrogate pair.
    """
    if len(text) > MAX_CHARACTERS:
        raise BadSample(f"A text of {len(text):,} characters is longer than the {MAX_CHARACTERS:,} allowed: {text[:40]!r}...")
    if "\0" in text:
        raise BadSample(f"A text has a NUL character at position {text.index(chr(0))}: {text[:40]!r}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half a character
        raise BadSample(f"A text has half of a surrogate pair at position {error.start}: {text[:40]!a}.") from error


def parse_llava(record: dict[str, Any]) -> tuple[list[Turn], list[str]]:
    """A record of a LLaVA file in, its turns and the names of its pictures out.

    As in LLaVA-1.5 the placeholder of a turn with one picture goes to the front of its text, on a line of its own, and an
    assistant's turn before the first question is dropped. With several pictures in a turn the placeholders stay where they are.
    The text of a `system` turn is put before the first question.

    Raises:
        BadSample: The record has no `conversations` of `from` and `value`, or an `image` that is not a name or a list of names.
    """
    images = _image_names(record)
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise BadSample("`conversations` is missing or empty. It must be a list of {'from': 'human' or 'gpt', 'value': text}.")
    system, turns = "", []
    for number, message in enumerate(messages, start=1):
        speaker, text = (message.get("from"), message.get("value")) if isinstance(message, dict) else (None, None)
        if speaker not in ("human", "gpt", "system") or not isinstance(text, str):
            raise BadSample(f"Turn {number} must have `from` human, gpt or system and a text `value`; it is {str(message)[:80]}.")
        if speaker == "system":
            system += f"{text}\n"
        elif speaker == "human":
            turns.append(Turn("user", system + (_image_first(text) if images else text)))
            system = ""
        elif turns:
            turns.append(Turn("assistant", text))
    return turns, images


def _image_names(record: dict[str, Any]) -> list[str]:
    images = record.get("image")
    if images is None:
        return []
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSample(f"`image` must be a file name or a list of file names; it is {str(images)[:80]}.")
    return names


def _image_first(text: str) -> str:
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()
