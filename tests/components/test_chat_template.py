"""Chat templates: rows of a tokenizer's own are what generation sees, and what we export gives our ids and labels."""

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from components.batch import IGNORE_INDEX
from components.chat_template import TEMPLATES, resolve_template, to_jinja
from components.conversation import encode, encode_prompt
from components.data import Preparation
from components.errors import RecipeError
from components.turns import Turn
from tests.components.small_tokenizers import (
    CHAT_TEMPLATES,
    KINDS,
    byte_level_tokenizer,
    chat_tokenizer,
    tokenizer_of,
    with_chat_template,
    with_image_token,
    word_tokenizer,
)

IMAGE_TOKEN_ID = -200
OWN = ("chatml", "thinking", "headers", "inst", "inst of word", "inst of llama", "inst of llama legacy")
CONVERSATIONS = {
    "one round": ["what color is the bus?", "It is red."],
    "rounds": ["Is it red?\nSay yes or no.", "yes", "日本 🐶 {braces}", "It's 3 buses,\n\n1. red\n2. blue", "and?", "no"],
    "words of the template": ["user assistant [/INST] USER:", "ASSISTANT: A: <s >", "Q: [INST]", "x"],
}


@pytest.fixture(params=OWN)
def own(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template."""
    name, _, kind = request.param.partition(" of ")
    return with_chat_template(tokenizer_of(kind, request), name) if kind else chat_tokenizer(name)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return tokenizer_of(request.param, request)


def as_turns(texts: list[str]) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def as_messages(texts: list[Any]) -> list[dict[str, Any]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def applied(tokenizer: Any, texts: list[Any], **options: Any) -> Any:
    return tokenizer.apply_chat_template(as_messages(texts), return_dict=False, **options)


# --- the tokenizer's own


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_prompts_are_those_of_the_tokenizer_at_every_round(own: PreTrainedTokenizerBase, conversation: str) -> None:
    texts = CONVERSATIONS[conversation]
    ids, labels = encode(as_turns(texts), 0, own, "chat_template", 1, IMAGE_TOKEN_ID)
    for number in range(1, len(texts), 2):
        prompt = encode_prompt(as_turns(texts[:number]), 0, own, "chat_template", 1, IMAGE_TOKEN_ID)
        assert prompt.tolist() == applied(own, texts[:number], add_generation_prompt=True)
        assert ids[: len(prompt)].tolist() == prompt.tolist()  # the row is what generation sees
        assert labels[len(prompt) - 1] == IGNORE_INDEX
        assert labels[len(prompt)] != IGNORE_INDEX


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_rows_are_those_of_the_tokenizer_up_to_the_last_end_token(own: PreTrainedTokenizerBase, conversation: str) -> None:
    texts = CONVERSATIONS[conversation]
    ids, _ = encode(as_turns(texts), 0, own, "chat_template", 1, IMAGE_TOKEN_ID)
    theirs = applied(own, texts)
    end = Preparation("chat_template", "upright", "pad", 100).end_token_id(own)
    theirs = theirs[: len(theirs) - theirs[::-1].index(end)]
    if own is chat_tokenizer("thinking"):  # into the last answer alone the template writes an empty thought: no prompt has it
        thought = own.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
        start = theirs.index(thought[0])
        assert theirs[start : start + len(thought)] == thought
        del theirs[start : start + len(thought)]
    assert ids.tolist() == theirs


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_exactly_the_answers_and_their_ends_are_supervised(own: PreTrainedTokenizerBase, conversation: str) -> None:
    texts = CONVERSATIONS[conversation]
    ids, labels = encode(as_turns(texts), 0, own, "chat_template", 1, IMAGE_TOKEN_ID)
    learned = labels != IGNORE_INDEX
    np.testing.assert_array_equal(ids[learned], labels[learned])
    end = resolve_template("chat_template", own).end_token(own)
    space = " " if own.chat_template == CHAT_TEMPLATES["inst"] else ""
    expected = "".join(f"{space}{answer}{end}" for answer in texts[1::2])
    decoded = own.decode(labels[learned])
    assert decoded == (expected if own in map(chat_tokenizer, CHAT_TEMPLATES) else expected.removeprefix(" "))


def test_the_end_is_that_of_the_template() -> None:
    def end(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
        return tokenizer.convert_ids_to_tokens(Preparation(template, "upright", "pad", 100).end_token_id(tokenizer))

    assert end("chat_template", chat_tokenizer("chatml")) == "<|im_end|>"
    assert end("chat_template", chat_tokenizer("headers")) == "<|eot_id|>"
    assert end("brief", chat_tokenizer("headers")) == "<|end_of_text|>"
    assert end("plain", word_tokenizer()) == "</s>"  # has none of its own


def test_what_the_template_strips_is_stripped() -> None:
    texts = [" a \n", "\nred ", "\n b", " bus\n"]
    for name, strips in (("headers", True), ("chatml", False)):
        tokenizer = chat_tokenizer(name)
        ids, _ = encode(as_turns(texts), 0, tokenizer, "chat_template", 1, IMAGE_TOKEN_ID)
        same, _ = encode(as_turns([text.strip() for text in texts]), 0, tokenizer, "chat_template", 1, IMAGE_TOKEN_ID)
        assert (ids.tolist() == same.tolist()) == strips
        prompt = encode_prompt(as_turns(texts[:1]), 0, tokenizer, "chat_template", 1, IMAGE_TOKEN_ID)
        assert prompt.tolist() == applied(tokenizer, texts[:1], add_generation_prompt=True)


def test_an_answer_that_melts_into_the_prompt_follows_the_prompt_of_generation() -> None:
    tokenizer = chat_tokenizer("chatml")
    assert (
        applied(tokenizer, ["a", "\nred"]) != encode(as_turns(["a", "\nred"]), 0, tokenizer, "chat_template", 1, -200)[0].tolist()
    )
    ids, labels = encode(as_turns(["a", "\nred"]), 0, tokenizer, "chat_template", 1, IMAGE_TOKEN_ID)
    prompt = applied(tokenizer, ["a"], add_generation_prompt=True)
    assert ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == "\nred<|im_end|>"


UNSUITABLE = {
    "dated": ("{{ strftime_now('%d') }}" + CHAT_TEMPLATES["chatml"], "writes the date of the day into prompts"),
    "asks for a system prompt": (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}",
        r"fails on a conversation of user and assistant without a system prompt \(no system\)",
    ),
    "begins an answer otherwise in the history": (
        CHAT_TEMPLATES["chatml"].replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}"),
        "does not begin the history of a conversation with the prompt",
    ),
    "no end": ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}", "puts no special token after"),
    "end in the history alone": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
        "puts no special token after",
    ),
    "forgets": (
        "{% for m in messages[-3:] %}{{ m['role'] + '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}",
        "writes a later round differently",
    ),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_templates_without_a_row_of_all_prompts_are_refused(case: str) -> None:
    tokenizer = chat_tokenizer("chatml")
    jinja, message = UNSUITABLE[case]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", jinja)
        with pytest.raises(RecipeError, match=message + r"[^$]* or use one of: plain, vicuna_v1"):
            resolve_template("chat_template", tokenizer)


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(RecipeError, match="no chat template. Name the tokenizer of a model that was tuned on conversations"):
        resolve_template("chat_template", word_tokenizer())


# --- to Jinja

MESSAGES = {  # pictures of each turn, texts
    "text": ([0], ["what color?", "red"]),
    "picture": ([1], ["what color?", "It is red."]),
    "two pictures": ([2], ["same?", "日本"]),
    "picture alone": ([1], ["", "7 buses"]),
    "rounds": ([1, 0, 2], ["what?", "red", "and {text} 'a' \"b\"?\n", "bus\nred", " x", "5"]),
    "empty answer": ([0, 1], ["a", "", "b", "red"]),
}


def contents(pictures: list[int], texts: list[str]) -> list[Any]:
    """Messages as a user of the exported model writes them."""
    made: list[Any] = list(texts)
    for number, count in enumerate(pictures):
        if count:
            made[2 * number] = [{"type": "image"}] * count + [{"type": "text", "text": texts[2 * number]}]
    return made


def exported_ids(tokenizer: PreTrainedTokenizerBase, jinja: str, messages: list[Any], **options: Any) -> Any:
    found = applied(with_image_token(tokenizer), messages, chat_template=jinja, **options)
    image = with_image_token(tokenizer).convert_tokens_to_ids("<image>")
    return [IMAGE_TOKEN_ID if one == image else one for one in found]


def compare(tokenizer: PreTrainedTokenizerBase, name: str, case: str, prompts_only: bool = False) -> None:
    """Ids of what is exported and ours, of every prompt and of the row."""
    pictures, texts = MESSAGES[case]
    jinja = to_jinja(resolve_template(name, tokenizer), tokenizer)
    asked = list(texts)
    for number, count in enumerate(pictures):
        asked[2 * number] = "<image>\n" * count + texts[2 * number]
    messages = contents(pictures, texts)
    rounds = len(texts) // 2 if resolve_template(name, tokenizer).later else 1
    for number in range(rounds):
        last, seen = 2 * number + 1, sum(pictures[: number + 1])
        prompt = encode_prompt(as_turns(asked[:last]), seen, tokenizer, name, 1, IMAGE_TOKEN_ID)
        assert exported_ids(tokenizer, jinja, messages[:last], add_generation_prompt=True) == prompt.tolist()
        if not prompts_only and any(texts[1 : last + 1 : 2]):
            ids, labels = encode(as_turns(asked[: last + 1]), seen, tokenizer, name, 1, IMAGE_TOKEN_ID)
            theirs = exported_ids(tokenizer, jinja, messages[: last + 1])
            assert theirs[: len(ids)] == ids.tolist()
            if name != "chat_template":
                assert len(theirs) == len(ids)
                assert_mask_is_ours(tokenizer, jinja, messages[: last + 1], labels)


def assert_mask_is_ours(tokenizer: PreTrainedTokenizerBase, jinja: str, messages: list[Any], labels: np.ndarray) -> None:
    found: Any = with_image_token(tokenizer).apply_chat_template(
        as_messages(messages), chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True
    )
    theirs = np.array(found["assistant_masks"], dtype=bool)
    # transformers sees the last of the answer's letters as one token; without an end token that may be a run of bytes
    in_run = [found.token_to_chars(number) == found.token_to_chars(len(theirs) - 1) for number in range(len(theirs))]
    if labels[-1] != tokenizer.eos_token_id and theirs.any():
        theirs |= np.array(in_run)
    assert theirs.tolist() == (labels != IGNORE_INDEX).tolist()


@pytest.mark.parametrize("case", MESSAGES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_exported_template_gives_our_ids_and_labels(template: str, case: str, tokenizer: PreTrainedTokenizerBase) -> None:
    compare(tokenizer, template, case)


@pytest.mark.parametrize("case", [case for case in MESSAGES if case != "empty answer"])
def test_the_tokenizers_own_is_exported_with_room_for_pictures(case: str, own: PreTrainedTokenizerBase) -> None:
    compare(own, "chat_template", case, prompts_only=own is chat_tokenizer("thinking"))


def test_a_template_that_takes_pictures_is_not_changed() -> None:
    takes = CHAT_TEMPLATES["chatml"].replace(
        "message['content'] +",
        "(message['content'] if message['content'] is string else "
        "message['content'] | map(attribute='text', default='<image>\\n') | join) +",
    )
    tokenizer = with_chat_template(chat_tokenizer("chatml"), "chatml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", takes)
        assert to_jinja(resolve_template("chat_template", tokenizer), tokenizer) == takes
    assert to_jinja(resolve_template("chat_template", tokenizer), tokenizer).endswith(CHAT_TEMPLATES["chatml"])


def test_a_system_message_goes_before_the_next_question() -> None:
    tokenizer = byte_level_tokenizer()
    jinja = to_jinja(TEMPLATES["brief"], tokenizer)
    content = [{"type": "text", "text": "what?"}, {"type": "image"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    found = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False)
    assert found == "Q: Be brief.\n<image>\nwhat? A:"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("brief", as_messages(["a", "b"])[1:], "Turns alternate, the user first; this one is of assistant"),
        ("brief", as_messages(["a"]) * 2, "Turns alternate"),
        ("plain", as_messages(["a", "b", "c"]), "takes one question and one answer"),
        ("brief", as_messages([[{"type": "video"}]]), "Contents are text and image, not video"),
    ],
)
def test_conversations_that_are_not_of_the_template_fail(template: str, messages: Any, message: str) -> None:
    jinja = to_jinja(TEMPLATES[template], word_tokenizer())
    with pytest.raises(Exception, match=message):
        render_jinja_template([messages], chat_template=jinja, bos_token="<s>", eos_token="</s>")
