"""Conversations: answers supervised exactly for any template and tokenizer, LLaVA records read as LLaVA-1.5 does, refusals."""

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from components.batch import IGNORE_INDEX
from components.chat_template import TEMPLATES
from components.conversation import encode, encode_prompt
from components.errors import BadSample, RecipeError
from components.tokenizer import WordTokenizer
from components.turns import Turn, parse_llava
from tests.components.small_tokenizers import KINDS, byte_level_tokenizer, tokenizer_of, word_tokenizer

IMAGE_TOKEN_ID = -200


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return tokenizer_of(request.param, request)


# --- properties for any template and tokenizer ----------------------------------------------------------------------------------

CONVERSATIONS = {
    "image first": (1, ["<image>\nwhat color", "red bus"]),
    "image in the middle": (1, ["Look at <image> now", "It is red."]),
    "image last": (1, ["what<image>", "日本 🐶"]),
    "image alone": (1, ["<image>", "red"]),
    "two images": (2, ["Is <image> like\n<image>?", "yes {braces} {answer}"]),
    "no image": (0, ["Hi {question}", "hello  two spaces"]),
    "rounds": (2, ["<image>\na", "red", "b", "bus red", "and <image> c", "x\ny"]),
    "spaces around": (0, [" q ", " a ", "\n", "\n"]),
    "empty answer between": (0, ["a", "", "b", "red"]),
    "words of the template": (0, ["ASSISTANT: [/INST] A:", "USER: Q: [INST] ASSISTANT: x", "A: B", "Q: ASSISTANT:"]),
}


def as_turns(texts: list[str]) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_exactly_the_answers_are_supervised(template: str, conversation: str, tokenizer: PreTrainedTokenizerBase) -> None:
    num_images, texts = CONVERSATIONS[conversation]
    if template == "plain":
        texts = texts[:2]
        num_images = texts[0].count("<image>")
        if not texts[1]:
            return
    turns = as_turns(texts)
    ids, labels = encode(turns, num_images, tokenizer, template, tokens_per_image=4, image_token_id=IMAGE_TOKEN_ID)
    supervised = labels != IGNORE_INDEX
    np.testing.assert_array_equal(ids[supervised], labels[supervised])

    end = tokenizer.eos_token if TEMPLATES[template].ends else ""
    learned = [TEMPLATES[template].answer.format(answer=answer) + end for answer in texts[1::2] if answer]
    expected = "".join(learned)
    if tokenizer is not byte_level_tokenizer() and template != "plain":
        expected = expected.removeprefix(" ")  # sentencepiece's decoding takes one leading space for its own
    assert tokenizer.decode(labels[supervised]) == expected

    slots = np.flatnonzero(ids == IMAGE_TOKEN_ID)
    assert len(slots) == 4 * num_images
    if template != "plain":
        words = tokenizer.decode(ids[ids != IMAGE_TOKEN_ID])
        assert all(part in words for text in texts for part in text.split("<image>"))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2", "brief"])
def test_a_prompt_is_the_training_row_up_to_the_answer(
    template: str, conversation: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    _, texts = CONVERSATIONS[conversation]
    turns = as_turns(texts)
    for last in range(0, len(turns), 2):
        if not texts[last + 1]:
            continue
        num_images = sum(text.count("<image>") for text in texts[: last + 1])
        prompt = encode_prompt(turns[: last + 1], num_images, tokenizer, template, 4, IMAGE_TOKEN_ID)
        ids, labels = encode(turns[: last + 2], num_images, tokenizer, template, 4, IMAGE_TOKEN_ID)
        np.testing.assert_array_equal(ids[: len(prompt)], prompt)
        assert (labels[len(prompt) :] != IGNORE_INDEX).all()
        assert labels[len(prompt) - 1] == IGNORE_INDEX


def test_slots_stand_where_the_placeholders_stood() -> None:
    tokenizer = word_tokenizer()
    turns = as_turns(["red<image>bus<image>", "red"])
    ids, _ = encode(turns, 2, tokenizer, "brief", tokens_per_image=3, image_token_id=7)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], ids == 7, [0]])))
    parts = [tokenizer.decode(ids[a:b]) for a, b in zip([0, *runs[1::2]], [*runs[0::2], len(ids)], strict=True)]
    assert parts == ["<s> Q: red", "bus", " A: red</s>"]  # decoding takes one leading space for its own
    np.testing.assert_array_equal(np.diff(runs)[::2], [3, 3])


def test_ids_of_pad_and_end_inside_an_answer_are_supervised_by_position() -> None:
    tokenizer = word_tokenizer()  # its pad is <unk>, id 0
    _, labels = encode(as_turns(["a", "red<unk>bus</s>red"]), 0, tokenizer, "brief", 1, IMAGE_TOKEN_ID)
    assert (labels == tokenizer.pad_token_id).sum() == 1
    assert (labels == tokenizer.eos_token_id).sum() == 2


def test_a_last_question_is_read_but_not_learned() -> None:
    turns = as_turns(["a", "red", "b"])
    ids, labels = encode(turns, 0, word_tokenizer(), "brief", 1, IMAGE_TOKEN_ID)
    np.testing.assert_array_equal(ids, encode_prompt(turns, 0, word_tokenizer(), "brief", 1, IMAGE_TOKEN_ID))
    assert (labels != IGNORE_INDEX).sum() == 2


# --- reading LLaVA records ------------------------------------------------------------------------------------------------------


def record(*texts: str, **keys: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    return {"conversations": [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)], **keys}


@pytest.mark.parametrize("text", ["<image>\nwhat?", "what?\n<image>", "<image>what?", "  what? <image>  ", "wh<image>at?"])
def test_one_placeholder_goes_first_as_in_the_original(text: str) -> None:
    turns, images = parse_llava(record(text, "red", image="a.jpg"))
    assert turns == [Turn("user", "<image>\nwhat?"), Turn("assistant", "red")]
    assert images == ["a.jpg"]


def test_several_placeholders_stay_where_they_are() -> None:
    turns, images = parse_llava(record("Is <image> like <image>?", "no", "and <image>", "x", image=["a", "b", "c"]))
    assert [turn.text for turn in turns] == ["Is <image> like <image>?", "no", "<image>\nand", "x"]
    assert images == ["a", "b", "c"]


def test_text_without_pictures_is_left_alone() -> None:
    assert parse_llava(record(" a \n", " b ")) == ([Turn("user", " a \n"), Turn("assistant", " b ")], [])
    assert parse_llava(record("a", "b", image=None))[1] == []


def test_system_text_goes_before_the_first_question_and_a_leading_answer_is_dropped() -> None:
    sample = record("a", "b")
    sample["conversations"][:0] = [{"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "Welcome."}]
    assert parse_llava(sample)[0] == [Turn("user", "Be brief.\na"), Turn("assistant", "b")]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({}, "`conversations` is missing or empty"),
        ({"conversations": []}, "`conversations` is missing or empty"),
        ({"conversations": ["a"]}, "Turn 1 must have `from` human, gpt or system"),
        ({"conversations": [{"from": "user", "value": "a"}]}, "Turn 1 must have `from` human, gpt or system"),
        ({"conversations": [{"from": "human", "value": None}]}, "Turn 1 must have .* a text `value`"),
        (record("a", "b", image=3), "`image` must be a file name or a list of file names; it is 3"),
        (record("a", "b", image=["a", 3]), "`image` must be a file name or a list of file names"),
    ],
)
def test_other_records_are_refused(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSample, match=message):
        parse_llava(sample)


# --- samples that cannot be used ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "num_images", "template", "message"),
    [
        (["a", "b"], 1, "brief", r"0 <image> placeholder\(s\) but 1 image\(s\). Add the missing placeholders"),
        (["<image>", "b"], 0, "brief", r"1 <image> placeholder\(s\) but 0 image\(s\). Remove placeholders"),
        (["<image><image>", "b"], 1, "plain", r"2 <image> placeholder\(s\) but 1 image"),
        (["a", "see <image>"], 1, "brief", "Turn 2 is an answer with an <image> placeholder"),
        ([], 0, "brief", "The conversation has no question"),
        (["a"], 0, "brief", "There is nothing to learn"),
        (["a", ""], 0, "brief", "There is nothing to learn"),
        (["a", "b", "c", "d"], 0, "plain", "Template plain takes one question and one answer; the conversation has 4 turns"),
    ],
)
def test_unusable_conversations_are_bad_samples(texts: list[str], num_images: int, template: str, message: str) -> None:
    with pytest.raises(BadSample, match=message):
        encode(as_turns(texts), num_images, word_tokenizer(), template, 1, IMAGE_TOKEN_ID)


def test_turns_must_alternate() -> None:
    for roles, message in [(("user", "user"), "Turn 2 is the user's but must be the assistant's"), (("assistant",), "Turn 1 is")]:
        with pytest.raises(BadSample, match=message):
            encode([Turn(role, "a") for role in roles], 0, word_tokenizer(), "brief", 1, IMAGE_TOKEN_ID)


@pytest.mark.parametrize("texts", [[], ["a", "b"]])
def test_a_prompt_must_end_with_a_question(texts: list[str]) -> None:
    with pytest.raises(BadSample, match="must end with a turn of the user"):
        encode_prompt(as_turns(texts), 0, word_tokenizer(), "brief", 1, IMAGE_TOKEN_ID)


def test_mistakes_in_the_recipe_are_not_blamed_on_the_sample() -> None:
    with pytest.raises(RecipeError, match=r"no template 'vicuna'. Use one of: plain, vicuna_v1, llama_2") as caught:
        encode(as_turns(["a", "b"]), 0, word_tokenizer(), "vicuna", 1, IMAGE_TOKEN_ID)
    assert not isinstance(caught.value, BadSample)
    endless = WordTokenizer().build()
    endless.eos_token = None
    with pytest.raises(RecipeError, match="this tokenizer has no eos_token") as caught:
        encode(as_turns(["a", "b"]), 0, endless, "brief", 1, IMAGE_TOKEN_ID)
    assert not isinstance(caught.value, BadSample)
