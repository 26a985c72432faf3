"""The template that a tokenizer brings along, read off its Hugging Face chat template."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from components.chat_template.template import TEMPLATES, Template
from components.chat_template.token_ids import Tokenizer
from components.errors import RecipeError

OF_TOKENIZER = "chat_template"
"""Name of the template that the tokenizer brings along."""


def resolve_template(name: str, tokenizer: Tokenizer) -> Template:
    """A name of `TEMPLATES`, or `chat_template` for the tokenizer's own, in; the template out.

    Raises:
        RecipeError: There is no such template, the tokenizer has no end token that it needs, or the tokenizer's own chat template
            does not give a training row of which every prompt is a part.
    """
    if name == OF_TOKENIZER:
        try:
            jinja = tokenizer.get_chat_template()  # type: ignore[attr-defined]
        except ValueError as error:
            raise RecipeError(
                "This tokenizer has no chat template. Name the tokenizer of a model that was tuned on conversations, "
                f"or use one of: {', '.join(TEMPLATES)}."
            ) from error
        return _of_tokenizer(tokenizer, jinja)
    if name not in TEMPLATES:
        raise RecipeError(f"There is no template '{name}'. Use one of: {', '.join([*TEMPLATES, OF_TOKENIZER])}.")
    TEMPLATES[name].end_token(tokenizer)
    return TEMPLATES[name]


_QUESTIONS = ("theQuestionOne", "theQuestionTwo", "theQuestionThree")
_ANSWERS = ("theAnswerOne", "theAnswerTwo")


def renderer(tokenizer: Any, jinja: str) -> Callable[..., str]:
    """A function that renders contents of user and assistant, in turns; `prompt` asks for the beginning of the next answer."""

    def render(*contents: Any, prompt: bool = True) -> str:
        messages = [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]
        return tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=prompt)

    return render


@lru_cache(maxsize=8)
def _of_tokenizer(tokenizer: Any, jinja: str) -> Template:
    """The template whose rows hold, round by round, the prompts that the tokenizer's chat template makes for generation.

    It is read off renderings of known questions and answers. What a chat template writes into the last answer alone, such as
    Qwen3's empty thinking block, no prompt ever holds: it is left out.
    """
    if "strftime_now" in jinja:
        raise unsuitable("writes the date of the day into prompts, so that no run could be repeated", "Write a date into it.")
    render = renderer(tokenizer, jinja)
    one, two, three = _QUESTIONS
    answer, other = _ANSWERS
    try:
        first, second = render(one), render(one, answer, two)
        third, whole = render(one, answer, two, other, three), render(one, answer, prompt=False)
        strips = render(f" {one} ") == first, render(one, f" {answer} ", two) == second
    except (TemplateError, TypeError) as error:
        raise unsuitable(f"fails on a conversation of user and assistant without a system prompt ({error})") from error
    if not second.startswith(first):
        raise unsuitable(
            "does not begin the history of a conversation with the prompt that its first answer was given to:\n"
            f"  prompt  ... {first[-60:]!r}\n  history ... {second[: len(first)][-60:]!r}"
        )
    before, _, after = second[len(first) :].partition(answer)
    tokens = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, tokens)) or "(?!)", after.partition(two)[0])
    if not found or f"{answer}{after[: found.end()]}" not in whole:
        raise unsuitable("puts no special token after an answer, so that generation could not stop")
    template = Template(
        first=_escape(first).replace(one, "{question}"),
        later=_escape(after[found.end() :]).replace(two, "{question}"),
        answer=f"{_escape(before)}{{answer}}{_escape(after[: found.start()])}",
        end=found.group(),
        jinja=jinja,
        strips=strips,
    )
    if third != "".join(
        [
            template.first.format(question=one),
            template.answer.format(answer=answer) + found.group(),
            template.later.format(question=two),
            template.answer.format(answer=other) + found.group(),
            template.later.format(question=three),
        ]
    ):
        raise unsuitable("writes a later round differently from an earlier one")
    return template


def unsuitable(why: str, remedy: str = "Edit it in a copy of the tokenizer's folder and name that folder,") -> RecipeError:
    """The error that says why a tokenizer's chat template cannot be used."""
    return RecipeError(f"The chat template of this tokenizer {why}. {remedy} or use one of: {', '.join(TEMPLATES)}.")


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
