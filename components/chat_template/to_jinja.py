"""A template as a Jinja chat template, for an exported model."""

import json
import re

from jinja2 import TemplateError

from components.chat_template.of_tokenizer import renderer, unsuitable
from components.chat_template.template import IMAGE_PLACEHOLDER, Template
from components.chat_template.token_ids import Tokenizer, ids_at_start, ids_of
from components.errors import RecipeError

_NOTHING = '""'
_MESSAGE = """\
{%- set part = namespace(images='', text='') -%}
{%- if message['content'] is string -%}
  {%- set part.text = message['content'] -%}
{%- else -%}
  {%- for item in message['content'] -%}
    {%- if item['type'] == 'image' -%}
      {%- set part.images = part.images + '<image>\\n' -%}
    {%- elif item['type'] == 'text' -%}
      {%- set part.text = part.text + item['text'] -%}
    {%- else -%}
      {{- raise_exception('Contents are text and image, not ' + item['type']) -}}
    {%- endif -%}
  {%- endfor -%}
{%- endif -%}
"""
_OURS = """\
{%- set state = namespace(system='', next='user', first=true) -%}
{%- for message in messages -%}
MESSAGE{%- if message['role'] == 'system' -%}
  {%- set state.system = state.system + part.text + '\\n' -%}
{%- elif message['role'] != state.next -%}
  {{- raise_exception('Turns alternate, the user first; this one is of ' + message['role']) -}}
{%- elif message['role'] == 'user' -%}
  {%- set text = state.system + part.images + part.text -%}
  {%- if state.first -%}
    {{- BEGIN -}}
    {%- set text = FIRST -%}
  {%- else -%}
    LATER
  {%- endif -%}
  {%- for chunk in text.split('<image>') -%}
    {%- if not loop.first -%}
      {{- '<image>' -}}
    {%- endif -%}
JOINT    {{- chunk -}}
  {%- endfor -%}
  {%- set state.system = '' -%}
  {%- set state.next = 'assistant' -%}
  {%- set state.first = false -%}
{%- else -%}
  {%- if part.text -%}
    {%- generation -%}
      {{- ANSWER -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- END -}}
  {%- endif -%}
  {%- set state.next = 'user' -%}
{%- endif -%}
{%- endfor -%}
"""
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is not defined or message['content'] is none or message['content'] is string -%}
  {%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
MESSAGE  {%- set flat.messages = flat.messages + [dict(message, content=part.images + part.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
{{- '' }}"""


def to_jinja(template: Template, tokenizer: Tokenizer) -> str:
    """A template in, a Hugging Face chat template out that gives the ids of `encode` and `encode_prompt`.

    Contents of its messages are texts, or lists of `{"type": "image"}` and `{"type": "text", "text": ...}`; pictures come first in
    their turn. The tokenizer must know `<image>` as a special token. A system message goes before the next question, on a line of
    its own. A conversation that ends with a question always ends with the prompt for its answer. What is supervised is marked for
    `return_assistant_tokens_mask`, except in a tokenizer's own chat template: that is left as it is, with a part before it, where
    it needs one, that makes a text of contents with pictures.

    Args:
        template: One of `TEMPLATES`, or the tokenizer's own.
        tokenizer: The tokenizer, with or without `<image>`.

    Raises:
        RecipeError: The tokenizer's own chat template cannot take pictures, or this tokenizer treats text after a special token in
            a way that no chat template can lead to.
    """
    if template.jinja:
        return _with_pictures(template.jinja, tokenizer)
    joint = _literal(_joint(tokenizer))
    end = "eos_token" if template.ends else _NOTHING
    begin = "bos_token" if template.begin_token(tokenizer) else _NOTHING
    later = _sum(begin if template.begins_every_round else _NOTHING, _expression(template.later))
    one_round = "{{- raise_exception('This template takes one question and one answer') -}}"
    put_joint = f"    {{%- if chunk and (state.first or not loop.first) -%}}{{{{- {joint} -}}}}{{%- endif -%}}\n"
    pieces = {
        "MESSAGE": _MESSAGE,
        "BEGIN": begin,
        "FIRST": _expression(template.first),
        "LATER": f"{{%- set text = {later} -%}}" if template.later else one_round,
        "JOINT": "" if joint == _NOTHING else put_joint,
        "ANSWER": _sum(_NOTHING if template.before_answer else joint, _expression(template.answer), end),
        "END": end,
    }
    return re.sub(r"\b[A-Z]{3,}\b", lambda found: pieces[found.group()], _OURS)


def _with_pictures(jinja: str, tokenizer: Tokenizer) -> str:
    text, answer, other = "theQuestion", "theAnswer", "theNext"
    pictures = [{"type": "image"}, {"type": "text", "text": text}], answer, [{"type": "text", "text": other}]
    expected = renderer(tokenizer, jinja)(f"{IMAGE_PLACEHOLDER}\n{text}", answer, other)
    for candidate in (jinja, _FLATTEN.replace("MESSAGE", _MESSAGE) + jinja):
        try:
            if renderer(tokenizer, candidate)(*pictures) == expected:
                return candidate
        except (TemplateError, TypeError):
            continue
    raise unsuitable("does not take pictures")


def _joint(tokenizer: Tokenizer) -> str:
    """What must stand between a special token and a text in Jinja to give the ids of the text at the start of a row."""
    special = tokenizer.special_tokens_map.get("eos_token") or tokenizer.special_tokens_map.get("bos_token") or ""
    for joint in ("", " "):
        after = [ids_of(tokenizer, f"{special}{joint}{text}") for text in ("x", " x", "\nx")]
        if after == [ids_of(tokenizer, special) + ids_at_start(tokenizer, text) for text in ("x", " x", "\nx")]:
            return joint
    raise RecipeError("This tokenizer splits a text after a special token as no chat template can ask for. Use another one.")


def _expression(template: str) -> str:
    """A format string as a Jinja expression of the variables `text` (the user's) and `part.text` (the assistant's)."""
    names = {
        "{question}": "text",
        "{images}": "'<image>' * (text.split('<image>') | length - 1)",
        "{answer}": "part.text",
    }
    pieces = re.split(r"(\{[a-z]+\})", template)
    return _sum(*(names.get(piece) or _literal(piece.format()) for piece in pieces))


def _sum(*expressions: str) -> str:
    return " + ".join(one for one in expressions if one != _NOTHING) or _NOTHING


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
