"""Conversations: turns in, token ids and labels out, segment by segment; and prompts for generation.

Source: LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, llava/conversation.py and llava/train/train.py).
Differs: labels follow the segments that were tokenized, so a sample is trained or refused, never masked because lengths disagree.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from components.batch import IGNORE_INDEX
from components.chat_template import IMAGE_PLACEHOLDER, Tokenizer, resolve_template
from components.chat_template.token_ids import ids_at_start, ids_continuing, ids_of
from components.errors import BadSample
from components.turns import Turn


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
        template: A name in `TEMPLATES`, or `chat_template` for the tokenizer's own.
        tokens_per_image: Visual tokens that take the place of one placeholder.
        image_token_id: Id at every visual-token slot.

    Raises:
        BadSample: Turns do not alternate, placeholders and pictures differ in number, or no answer has any text.
        RecipeError: The template is unknown or does not suit the tokenizer.
    """
    ids, labels, _ = encode_within(turns, num_images, tokenizer, template, tokens_per_image, image_token_id, max_length=None)
    return ids, labels


def encode_within(
    turns: Sequence[Turn],
    num_images: int,
    tokenizer: Tokenizer,
    template: str,
    tokens_per_image: int,
    image_token_id: int,
    max_length: int | None,
) -> tuple[Int64[np.ndarray, " tokens"], Int64[np.ndarray, " tokens"], bool]:
    """As `encode`, with the last rounds of question and answer dropped until the rest fits, and whether any were.

    The arguments are those of `encode`, and the most tokens that there may be; None for as many as there are.

    Raises:
        BadSample: As `encode`, or the rounds up to the last picture are longer than `max_length`.
    """
    ids, labels, ends = _encode(turns, num_images, tokenizer, template, [image_token_id] * tokens_per_image)
    limit = len(ids) if max_length is None else max_length
    truncated = len(ids) > limit
    if truncated:  # a row is written from left to right: what comes later changes nothing of what stands there
        last_picture = max((number for number, turn in enumerate(turns) if IMAGE_PLACEHOLDER in turn.text), default=0)
        fitting = [end for number, end in enumerate(ends) if end <= limit and number >= last_picture // 2]
        if not fitting:
            raise BadSample(f"longer than data.max_length = {limit} tokens even without its last turns. Raise max_length.")
        ids, labels = ids[: fitting[-1]], labels[: fitting[-1]]
    targets = np.array(labels, dtype=np.int64)
    if (targets == IGNORE_INDEX).all():
        raise BadSample("There is nothing to learn: no turn of the assistant has any text. Remove the sample.")
    return np.array(ids, dtype=np.int64), targets, truncated


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
        RecipeError: The template is unknown or does not suit the tokenizer.
    """
    if not turns or turns[-1].role != "user":
        raise BadSample("A prompt must end with a turn of the user.")
    ids, _, _ = _encode(turns, num_images, tokenizer, template, [image_token_id] * tokens_per_image)
    return np.array(ids, dtype=np.int64)


def _encode(
    turns: Sequence[Turn], num_images: int, tokenizer: Tokenizer, template_name: str, image_slots: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Token ids, labels, and where each whole round of question and answer ends."""
    template = resolve_template(template_name, tokenizer)
    _check_turns(turns, num_images)
    if len(turns) > 2 and not template.later:
        raise BadSample(f"Template {template_name} takes one question and one answer; the conversation has {len(turns)} turns.")
    ids: list[int] = []
    labels: list[int] = []
    ends: list[int] = []

    def add(new_ids: Sequence[int], supervised: bool = False) -> None:
        ids.extend(new_ids)
        labels.extend(new_ids if supervised else [IGNORE_INDEX] * len(new_ids))

    begin, end, before_answer = template.begin_token(tokenizer), template.end_token(tokenizer), template.before_answer
    texts = [turn.text.strip() if template.strips[turn.role == "assistant"] else turn.text for turn in turns]
    add(ids_of(tokenizer, begin))
    for number in range(0, len(turns), 2):
        question = texts[number]
        images = IMAGE_PLACEHOLDER * question.count(IMAGE_PLACEHOLDER)
        text = (template.later if number else template.first).format(question=question, images=images)
        opening, *chunks = text.split(IMAGE_PLACEHOLDER)
        if number:
            # whether a space is put before a text that follows a special token is the tokenizer's choice (LLaMA's `legacy`)
            add(ids_continuing(tokenizer, (begin if template.begins_every_round else "") + opening, end))
        else:
            add(ids_of(tokenizer, opening) if template.jinja else ids_at_start(tokenizer, opening))
        for chunk in chunks:
            add(image_slots)
            # after <image> as a special token, as an exported model has it, or as LLaVA-1.5 splits the text
            add(ids_continuing(tokenizer, chunk, end) if template.jinja else ids_at_start(tokenizer, chunk))
        if number + 1 < len(turns):
            answer = template.answer.format(answer=texts[number + 1]) if texts[number + 1] else ""
            new_ids = ids_continuing(tokenizer, answer, before_answer) if before_answer else ids_at_start(tokenizer, answer)
            add(new_ids, supervised=True)
            add(ids_of(tokenizer, end), supervised=bool(answer))  # the end of an empty answer would teach to say nothing
            ends.append(len(ids))
    return ids, labels, ends


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
