"""Conversations: turns in, token ids and labels out, segment by segment; and prompts for generation.

Source: LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, llava/conversation.py and llava/train/train.py).
Differs: labels follow the segments that were tokenized, so a sample is trained or refused, never masked because lengths disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from components.batch import IGNORE_INDEX
from components.errors import BadSample, RecipeError

IMAGE_PLACEHOLDER = "<image>"


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Texts of `bos_token` and `eos_token`, as far as the tokenizer has them."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text."""

    def __hash__(self) -> int:
        """A key for what is known of the tokenizer."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Args:
        role: Who speaks.
        text: What is said; `<image>` in a user's turn stands for one picture.
    """

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text.

    Args:
        first: Text up to the first answer; `{question}` is the user's text, `{images}` its placeholders alone.
        later: Text up to each later answer, after the end token; empty when there is room for one question and answer only.
        answer: The supervised text around `{answer}`.
        ends: Whether the tokenizer's end token follows every answer (and is supervised).
        begins_every_round: Whether the begin token stands before every question, not only before the first.
    """

    first: str
    later: str
    answer: str
    ends: bool = True
    begins_every_round: bool = False


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


def _llama_2(system: str) -> Template:
    return Template(
        first=f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{{question}} [/INST]",
        later="[INST] {question} [/INST]",
        answer=" {answer} ",
        begins_every_round=True,
    )


TEMPLATES = {
    "plain": Template(first="{images}", later="", answer="{answer}\n", ends=False),
    "vicuna_v1": Template(
        first=_VICUNA_SYSTEM + " USER: {question} ASSISTANT:", later="USER: {question} ASSISTANT:", answer=" {answer}"
    ),
    "llama_2": _llama_2(_LLAMA_2_SYSTEM),
    "llava_llama_2": _llama_2(_LLAVA_LLAMA_2_SYSTEM),
    "brief": Template(first="Q: {question} A:", later="Q: {question} A:", answer=" {answer}"),
}
"""The templates by the names that recipes use. `plain` (picture, caption) pretrains a projector; `brief` suits small models."""


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


def encode(
    turns: Sequence[Turn],
    num_images: int,
    tokenizer: Tokenizer,
    template: str,
    tokens_per_image: int,
    image_token_id: int,
) -> tuple[Int64[np.ndarray, " tokens"], Int64[np.ndarray, " tokens"]]:
    """A conversation in, its token ids and labels out. Labels are the ids of every answer and its end, `IGNORE_INDEX` elsewhere.

    Args:
        turns: Turns that alternate, the user's first. A last question without an answer is read but teaches nothing.
        num_images: Pictures of the sample; as many `<image>` placeholders stand in the user's turns.
        tokenizer: A Hugging Face tokenizer.
        template: A name in `TEMPLATES`.
        tokens_per_image: Visual tokens that take the place of one placeholder.
        image_token_id: Id at every visual-token slot.

    Raises:
        BadSample: Turns do not alternate, placeholders and pictures differ in number, or no answer has any text.
        RecipeError: The template is unknown, or the tokenizer has no end token that the template needs.
    """
    ids, labels = _encode(turns, num_images, tokenizer, template, [image_token_id] * tokens_per_image)
    if all(label == IGNORE_INDEX for label in labels):
        raise BadSample("There is nothing to learn: no turn of the assistant has any text. Remove the sample.")
    return np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)


def encode_prompt(
    turns: Sequence[Turn],
    num_images: int,
    tokenizer: Tokenizer,
    template: str,
    tokens_per_image: int,
    image_token_id: int,
) -> Int64[np.ndarray, " tokens"]:
    """A conversation that ends with a question in, the token ids up to where the answer begins out.

    The arguments are those of `encode`.

    Raises:
        BadSample: The last turn is not the user's, turns do not alternate, or placeholders and pictures differ in number.
        RecipeError: The template is unknown, or the tokenizer has no end token that the template needs.
    """
    if not turns or turns[-1].role != "user":
        raise BadSample("A prompt must end with a turn of the user.")
    ids, _ = _encode(turns, num_images, tokenizer, template, [image_token_id] * tokens_per_image)
    return np.array(ids, dtype=np.int64)


def _encode(
    turns: Sequence[Turn], num_images: int, tokenizer: Tokenizer, template_name: str, image_slots: list[int]
) -> tuple[list[int], list[int]]:
    template = _template(template_name, tokenizer)
    _check_turns(turns, num_images)
    if len(turns) > 2 and not template.later:
        raise BadSample(f"Template {template_name} takes one question and one answer; the conversation has {len(turns)} turns.")
    ids: list[int] = []
    labels: list[int] = []

    def add(new_ids: Sequence[int], supervised: bool = False) -> None:
        ids.extend(new_ids)
        labels.extend(new_ids if supervised else [IGNORE_INDEX] * len(new_ids))

    begin = tokenizer.special_tokens_map.get("bos_token", "")
    end = tokenizer.special_tokens_map["eos_token"] if template.ends else ""
    add(_ids(tokenizer, begin))
    for number in range(0, len(turns), 2):
        question = turns[number].text
        images = IMAGE_PLACEHOLDER * question.count(IMAGE_PLACEHOLDER)
        text = (template.later if number else template.first).format(question=question, images=images)
        opening, *chunks = text.split(IMAGE_PLACEHOLDER)
        if number:
            # whether a space is put before a text that follows a special token is the tokenizer's choice (LLaMA's `legacy`)
            between = begin if template.begins_every_round else ""
            add(_ids(tokenizer, end + between + opening)[len(_ids(tokenizer, end)) :])
        else:
            add(_ids_at_start(tokenizer, opening))
        for chunk in chunks:
            add(image_slots)
            add(_ids_at_start(tokenizer, chunk))
        if number + 1 < len(turns):
            answer = turns[number + 1].text
            if answer:
                ids_of = _ids_after_text if template.answer.startswith(" ") else _ids_at_start
                add(ids_of(tokenizer, template.answer.format(answer=answer)), supervised=True)
            add(_ids(tokenizer, end), supervised=bool(answer))  # the end of an empty answer would teach to say nothing
    return ids, labels


def _template(name: str, tokenizer: Tokenizer) -> Template:
    if name not in TEMPLATES:
        raise RecipeError(f"There is no template '{name}'. Use one of: {', '.join(TEMPLATES)}.")
    template = TEMPLATES[name]
    if template.ends and "eos_token" not in tokenizer.special_tokens_map:
        raise RecipeError(f"Template {name} ends answers with the end token, but this tokenizer has no eos_token.")
    return template


def _check_turns(turns: Sequence[Turn], num_images: int) -> None:
    if not turns:
        raise BadSample("The conversation has no question.")
    for index, turn in enumerate(turns):
        role = "assistant" if index % 2 else "user"
        if turn.role != role:
            raise BadSample(f"Turn {index + 1} is the {turn.role}'s but must be the {role}'s: turns alternate, the user's first.")
        if role == "assistant" and IMAGE_PLACEHOLDER in turn.text:
            raise BadSample(f"Turn {index + 1} is an answer with an <image> placeholder. Placeholders belong in questions.")
    found = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if found != num_images:
        remedy = "Remove placeholders or add the missing images" if found > num_images else "Add the missing placeholders"
        raise BadSample(f"{found} <image> placeholder(s) but {num_images} image(s). {remedy}.")


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


@lru_cache(maxsize=2**14)
def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text. Cached: the words of a template, and often questions, come again in every sample."""
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()


def _ids_at_start(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text at the start of a row or after a picture. There sentencepiece puts one more space before any text."""
    return _ids(tokenizer, f" {text}" if text and _spaces(tokenizer).added_unless_there else text)


def _ids_after_text(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text that begins with a space and continues another."""
    return _ids(tokenizer, text[1:] if _spaces(tokenizer).always_added else text)


class _Spaces(NamedTuple):
    """What a tokenizer does at the start of every text it is given: byte-level ones neither, sentencepiece-like ones either."""

    always_added: bool
    added_unless_there: bool


@lru_cache(maxsize=8)
def _spaces(tokenizer: Tokenizer) -> _Spaces:
    x, space_x, x_space_x = (_ids(tokenizer, text) for text in ("x", " x", "x x"))
    return _Spaces(always_added=space_x != x_space_x[len(x) :], added_unless_there=space_x == x)
