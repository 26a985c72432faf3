"""Records of Hugging Face datasets: which of the usual layouts a table has, and how a record becomes a conversation.

Source: the columns of LLaVA's files, of TRL's vision chats (huggingface.co/docs/trl, "Dataset formats"), of
HuggingFaceM4/the_cauldron, and of caption pairs such as pixparse/cc3m.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from components.chat_template import IMAGE_PLACEHOLDER
from components.errors import BadSample, RecipeError
from components.turns import Turn, parse_llava


@dataclass(frozen=True)
class Layout:
    """Where a table has its text and its pictures.

    Args:
        name: What such records are called.
        text: The column of the text.
        pictures: The column of a picture or of a list of them; None where records have no pictures.
        turns: The text of a record and its number of pictures in, its turns out.
    """

    name: str
    text: str
    pictures: str | None
    turns: Callable[[Any, int], list[Turn]]


def recognize(columns: list[str], where: str) -> Layout:
    """The names of a table's columns in, its layout out.

    Raises:
        RecipeError: They are those of no layout.
    """
    pictures = next((name for name in ("images", "image") if name in columns), None)
    for name, column, turns in _CONVERSATIONS:
        if column in columns:
            return Layout(name, column, pictures, turns)
    caption = next((name for name in ("caption", "text") if name in columns), None)
    if pictures and caption:
        return Layout("pictures with captions", caption, pictures, _caption)
    raise RecipeError(
        f"{where} has the columns {', '.join(columns)}. Wanted: `conversations` (LLaVA), `messages` (chat) or `texts` "
        "(the_cauldron), each with `image` or `images` where there are pictures; or `image` with `caption` or `text`. "
        "Rename its columns (Dataset.rename_columns)."
    )


def pictures_of(value: Any) -> list[Any]:
    """A picture, a list of pictures or nothing in, a list of pictures out: each `{bytes, path}`, bytes, or a path."""
    if isinstance(value, list):
        return value
    nothing = value is None or (isinstance(value, dict) and value.get("bytes") is None and value.get("path") is None)
    return [] if nothing else [value]


def _llava(value: Any, num_pictures: int) -> list[Turn]:
    turns, _ = parse_llava({"conversations": _records(value), "image": [""] * num_pictures})
    return _pictures_first(turns, num_pictures)


def _chat(value: Any, num_pictures: int) -> list[Turn]:
    system, turns = "", []
    for number, message in enumerate(_records(value), start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise BadSample(f"Message {number} must have a `role` system, user or assistant; it is {str(message)[:80]}.")
        text = _content(message.get("content"), number)
        if role == "system":
            system += f"{text}\n"
        elif role == "user":
            turns.append(Turn("user", system + text))
            system = ""
        elif turns:
            turns.append(Turn("assistant", text))
    return _pictures_first(turns, num_pictures)


def _content(content: Any, number: int) -> str:
    """A text, or a list of parts that are texts and pictures, each picture on a line of its own."""
    if isinstance(content, str):
        return content
    parts = []
    for part in _records(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise BadSample(f"Message {number}: each part of `content` must be a text or an image; one is {str(part)[:80]}.")
        parts.append(IMAGE_PLACEHOLDER if kind == "image" else part["text"])
    if not parts:
        raise BadSample(f"Message {number}: `content` is missing or empty. It must be a text or a list of parts.")
    return "\n".join(parts)


def _cauldron(value: Any, num_pictures: int) -> list[Turn]:
    turns = []
    for number, pair in enumerate(_records(value), start=1):
        question, answer = (pair.get("user"), pair.get("assistant")) if isinstance(pair, dict) else (None, None)
        if not isinstance(question, str) or not isinstance(answer, str):
            raise BadSample(f"Exchange {number} must have texts `user` and `assistant`; it is {str(pair)[:80]}.")
        turns += [Turn("user", question), Turn("assistant", answer)]
    return _pictures_first(turns, num_pictures)


def _caption(value: Any, num_pictures: int) -> list[Turn]:
    if not isinstance(value, str) or not value.strip():
        raise BadSample("The caption is missing or empty.")
    return _pictures_first([Turn("user", ""), Turn("assistant", value)], num_pictures)


def _pictures_first(turns: list[Turn], num_pictures: int) -> list[Turn]:
    """Where no turn says at which place the pictures stand, they stand before the first question."""
    if not turns:
        raise BadSample("The conversation is missing, empty, or without a question.")
    if not num_pictures or any(turn.role == "user" and IMAGE_PLACEHOLDER in turn.text for turn in turns):
        return turns
    first = "\n".join([IMAGE_PLACEHOLDER] * num_pictures + [turns[0].text] * bool(turns[0].text))
    return [Turn("user", first), *turns[1:]]


def _records(value: Any) -> list[Any]:
    """A list of records; datasets before 4.0 stored a list of records as a record of lists."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) else []


_CONVERSATIONS = (
    ("LLaVA conversations", "conversations", _llava),
    ("chats", "messages", _chat),
    ("exchanges as in the_cauldron", "texts", _cauldron),
)
