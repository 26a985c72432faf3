"""Tokenizers: the file-free one behaves like LLaMA's, and LLaMA's own is read from its sentencepiece model without loss."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

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


# --- LLaMA's tokenizer.model without a tokenizer.json

TEXTS = [
    "a  b   c    d",
    "  two before",
    "after  ",
    "\n\n  \t x\n",
    "1 2345.67, 8-9",
    "Größe 日本語 🐶 العربية ไทย",
    "it's [INST] <<SYS>> (x) {y}",
    "print('a')\n    return    b",
    "",
    "▁",
    "ﬁ ﷺ Å",
]


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A folder as the hub has it, with nothing but the sentencepiece model."""
    shutil.copy(golden / "llava" / "tokenizer.model", tmp_path / "tokenizer.model")
    return tmp_path


def state(folder: Path, **entries: Any) -> str:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **entries}))
    return str(folder)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_ids_are_sentencepieces(golden: Path, folder: Path) -> None:
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(str(folder))
    random = np.random.default_rng(0)
    letters = np.array(list("  \n\tabeinrst.,'0123AÉ日🐶<>[]/"))
    noise = ["".join(random.choice(letters, random.integers(1, 40))) for _ in range(300)]
    with (golden / "llava" / "conversations.jsonl").open() as file:
        said = [turn["value"] for line in file for turn in json.loads(line)["conversations"]]
    compared = 0
    for text in [*TEXTS, *noise, *said]:
        if not any(special in text for special in ("<s>", "</s>", "<unk>")):
            # transformers puts the space of the beginning only where there is none
            assert plain_ids(tokenizer, f" {text}" if text.startswith((" ", "▁")) else text) == reference.encode(text), repr(text)
            compared += 1
    assert compared > 550


# transformers 5 puts no space between a special token in a text and a space after it, transformers 4 did with `legacy`
LEGACY_DIFFERS = ("special_text-bos-in-answer", "special_text-eos-in-answer-text")


@pytest.mark.parametrize(("legacy", "variant"), [(False, "v1"), (True, "v1_legacy"), (False, "llama_2"), (True, "llama_2_legacy")])
def test_ids_of_prompts_are_the_originals(golden: Path, folder: Path, legacy: bool, variant: str) -> None:
    tokenizer = load_tokenizer(state(folder, legacy=legacy))
    compared = 0
    with (golden / "llava" / "conversations.jsonl").open() as file:
        for sample in map(json.loads, file):
            result = sample["variants"][variant]
            # text alone is given to the original's tokenizer whole, begin token included
            if "image" not in sample and not result["error"] and not (legacy and sample["id"] in LEGACY_DIFFERS):
                prompt = result["prompt"].removeprefix("<s>")
                assert tokenizer.encode(prompt)[:2048] == result["input_ids"], sample["id"]
                compared += 1
    assert compared >= 20


def test_what_the_folder_states_holds(folder: Path) -> None:
    added = {"32000": {"content": "<image>", "special": True}, "32001": {"content": "<pad>", "special": True}}
    tokenizer: Any = load_tokenizer(
        state(folder, legacy=True, add_bos_token=False, pad_token="<pad>", added_tokens_decoder=added, chat_template="{{ 'x' }}")
    )
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<image>", "<pad>"]) == [0, 1, 2, 32000, 32001]
    assert (tokenizer.pad_token_id, tokenizer.chat_template, tokenizer.legacy) == (32001, "{{ 'x' }}", True)
    assert tokenizer.encode("hi") == [7251]
    assert plain_ids(tokenizer, "</s>USER") == [2, 3148, 1001]  # legacy puts a space there


def test_what_the_folder_does_not_state_is_llama_2s(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": 32000}))  # as transformers wrote them before 4.34
    tokenizer: Any = load_tokenizer(state(folder))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (1, 2, 0, 0)
    assert tokenizer.encode("hi <image>") == [1, 7251, 29871, 32000]
    assert plain_ids(tokenizer, "</s>USER") == [2, 11889]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_tokenizer_gives_the_same_ids(folder: Path, tmp_path: Path, legacy: bool) -> None:
    tokenizer = load_tokenizer(state(folder, legacy=legacy))
    tokenizer.save_pretrained(tmp_path / "saved")
    for again in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer(str(tmp_path / "saved"))):
        for text in [*TEXTS, "a</s>b </s> c"]:
            assert again.encode(text) == tokenizer.encode(text)
            assert plain_ids(again, text) == plain_ids(tokenizer, text)


def test_a_name_of_the_hub_is_a_folder_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's client lays out what it has fetched."""
    expected = load_tokenizer(state(folder, legacy=True)).encode(TEXTS[0])
    commit = "0" * 40
    snapshot = tmp_path / "hub" / "models--some--llama" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(folder / name, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_tokenizer("some/llama").encode(TEXTS[0]) == expected


def test_other_files_of_that_name_are_left_to_transformers(tmp_path: Path) -> None:
    WORDS.build().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text("dGhl 0\n")  # as LLaMA-3's
    assert load_tokenizer(str(tmp_path)).encode("red circle") == WORDS.build().encode("red circle")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match="No tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
