"""Tokenizers: the file-free one gives every text back, spends one token on a word, and behaves like LLaMA's."""

from pathlib import Path

import pytest

from components.errors import RecipeError
from components.tokenizer import WordTokenizer, load_tokenizer

WORDS = WordTokenizer(["what", "color", "red", "circle"])


@pytest.mark.parametrize(
    "text",
    [
        "red",
        "what color is it?",
        "red circle red",
        "redcircle",
        "Größe 日本語 🐶",
        "a  b",
        "line\nline\t",
        "▁x",
        "x " * 50,
    ],
)
def test_every_text_comes_back(text: str) -> None:
    tokenizer = WORDS.build()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text.replace("▁", " ")  # as in sentencepiece, the mark of a space is a space
    assert max(ids) < len(tokenizer)
    assert tokenizer.unk_token_id not in ids


def test_a_word_costs_one_token_and_a_byte_one() -> None:
    tokenizer = WORDS.build()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("what color circle", add_special_tokens=False)] == [
        "what",
        "color",
        "circle",
    ]
    assert len(tokenizer.encode("red zebra", add_special_tokens=False)) == 1 + 1 + 5  # a word, a space, five bytes
    assert len(WordTokenizer().build().encode("ü", add_special_tokens=False)) == 3


def test_special_tokens_are_llamas() -> None:
    tokenizer = WORDS.build()
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    ids = tokenizer.encode("red</s>", add_special_tokens=False)
    assert ids == [*tokenizer.encode("red", add_special_tokens=False), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "red"


def test_the_same_words_give_the_same_ids() -> None:
    assert WORDS.build().get_vocab() == load_tokenizer(WordTokenizer(WORDS.words)).get_vocab()
    assert len(WordTokenizer(["red", "red"]).build()) == len(WordTokenizer(["red"]).build())


def test_a_folder_is_a_tokenizer(tmp_path: Path) -> None:
    WORDS.build().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode("red circle") == WORDS.build().encode("red circle")


def test_a_folder_without_a_tokenizer_names_the_key_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'.*empty' \(key model\.decoder\.init_args\.tokenizer\)\. Give a hub name"):
        load_tokenizer(str(tmp_path / "empty"))
