"""Every golden conversation of LLaVA-1.5: equal to the last id and label, or listed here with the reason why not."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Document, SampleFormat
from components.chat_template import TEMPLATES
from components.conversation import encode, encode_prompt
from components.data import Preparation, Sample
from components.errors import BadSample
from components.tokenizer import WordTokenizer
from components.turns import Turn, parse_llava
from tests.components.small_tokenizers import llama_tokenizer

FEATURES, LIMIT = 576, 2048
VARIANTS = {
    "plain": ("plain", False),
    "v1": ("vicuna_v1", False),
    "llama_2": ("llama_2", False),
    "llava_llama_2": ("llava_llama_2", False),
    "v1_legacy": ("vicuna_v1", True),
    "llama_2_legacy": ("llama_2", True),
}

# what became of a sample, there (LLaVA-1.5) and here
EQUAL = "equal"
REFUSED_BY_BOTH = "refused by both"
LEARNED = "masked whole there, answers learned here"
LEARNED_TOO = "refused there, answers learned here"
NOTHING = "masked whole there, refused here"
REFUSED = "trained there, refused here"
DIFFERENT = "different"
CUT = "cut at 2048 there"
FAILS = "fails there once pictures are inserted"

END_IN_TEXT = "`</s>` in a text: the original splits the rounds there, its lengths disagree"
NO_ANSWER = "no turn of the assistant has any text"
Listed = dict[str, tuple[str, str]]
ROUNDS: Listed = {
    "structure-image-in-both-turns": (REFUSED, "two placeholders and one picture: the original fails when it inserts pictures"),
    "structure-image-key-without-token": (REFUSED, "a picture without a placeholder: the original trains without the picture"),
    "empty-middle-answer": (DIFFERENT, "the original leaves out the end of the empty answer and so merges two rounds into one"),
    "structure-system-role": (LEARNED_TOO, "the original knows no system role"),
    "empty-last-answer": (LEARNED, "the original takes the empty last answer for the place of an answer; the others are learned"),
    "structure-ends-with-human": (LEARNED, "the question without an answer is read; the answers before it are learned"),
    "special_text-eos-in-answer": (LEARNED, END_IN_TEXT),
    "special_text-eos-in-answer-text": (LEARNED, END_IN_TEXT),
    "special_text-unk-in-answer": (LEARNED, "`<unk>` has the id of the padding, so the original counts too few tokens"),
    "empty-answer-text": (NOTHING, NO_ANSWER),
    "structure-only-human": (NOTHING, NO_ANSWER),
    "structure-only-human-text": (NOTHING, NO_ANSWER),
    "structure-only-gpt": (NOTHING, "there is no question"),
}
V1: Listed = {
    **ROUNDS,
    "empty-question-text": (LEARNED, "the original takes the empty question for the place of an answer"),
    "special_text-assistant-in-answer": (LEARNED, "` ASSISTANT: ` in an answer: the original splits the round there"),
    "special_text-assistant-in-question": (LEARNED, "` ASSISTANT: ` in a question: the original splits the round there"),
}
LLAMA_2: Listed = {
    **ROUNDS,
    "empty-question-text": (LEARNED_TOO, "the original demands a first message that is not empty"),
    "special_text-inst-in-answer": (LEARNED, "`[/INST] ` in an answer: the original splits the round there"),
    "special_text-inst-in-question": (LEARNED, "`[/INST] ` in a question: the original splits the round there"),
}
LEGACY: Listed = {
    "special_text-bos-in-answer": (DIFFERENT, "transformers 5 puts no space between a special token in a text and a space after it")
}
TEXT_ALONE = (
    *(f"text_only-{name}" for name in ("hello", "list", "trans", "tiny", "punct")),
    *("unicode-rare", "unicode-thai", "whitespace-question-trailing-text", "whitespace-question-trailing-nl-text"),
    *("empty-question-text", "special_text-eos-in-answer-text", "special_text-sys", "special_text-angle"),
    *("structure-gpt-first-image", "structure-gpt-first-text", "structure-system-role"),
    *(f"code_numbers-{name}" for name in ("numbers", "latex", "url", "cpp")),
    *(f"long-text-{name}" for name in ("answer", "exact-2047", "exact-2048", "exact-2049")),
)
LISTED: dict[str, Listed] = {
    "plain": dict.fromkeys(TEXT_ALONE, (LEARNED_TOO, "the original's plain demands two turns with a picture in the first")),
    "v1": V1,
    "llama_2": LLAMA_2,
    "llava_llama_2": LLAMA_2,
    "v1_legacy": V1 | LEGACY,
    "llama_2_legacy": LLAMA_2 | LEGACY,
}

WHY_CUT = "the original cuts anywhere, also inside an answer; here whole turns are dropped from the end, or the sample is refused"
ONE_TEXT_CUT = ("long-text-answer", "long-text-exact-2049")
TEXTS_CUT = (*ONE_TEXT_CUT, "long-text-exact-2047", "long-text-exact-2048")  # llama_2 takes more tokens than v1
IMAGES_CUT = ("long-image-answer", "long-image-over-after-expansion")
V1_CUT = (*ONE_TEXT_CUT, *IMAGES_CUT, "long-image-placeholder-past-limit", "long-image-exact-2049")
LLAMA_2_CUT = (*TEXTS_CUT, *V1_CUT[2:], "long-image-exact-2047")
CUT_WITH_PICTURES = {
    "plain": IMAGES_CUT,
    **dict.fromkeys(("v1", "v1_legacy"), V1_CUT),
    **dict.fromkeys(("llama_2", "llava_llama_2", "llama_2_legacy"), LLAMA_2_CUT),
}
CUT_AS_TEXT = {variant: [name for name in names if name in TEXTS_CUT] for variant, names in CUT_WITH_PICTURES.items()}


def golden_samples(golden: Path) -> list[dict[str, Any]]:
    with (golden / "llava" / "conversations.jsonl").open() as file:
        return [json.loads(line) for line in file]


def tokenizer_of(golden: Path, legacy: bool) -> Any:
    return llama_tokenizer(golden / "llava" / "tokenizer.model", legacy)


def encoded(sample: dict[str, Any], variant: str, golden: Path, tokens_per_image: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Our ids and labels, or None for a sample that is refused."""
    template, legacy = VARIANTS[variant]
    try:
        turns, images = parse_llava(sample)
        return encode(turns, len(images), tokenizer_of(golden, legacy), template, tokens_per_image, IMAGE_TOKEN_ID)
    except BadSample:
        return None


def labels_of(result: dict[str, Any], length: int) -> np.ndarray:
    labels = np.full(length, IGNORE_INDEX)
    for start, ids in result["label_spans"]:
        labels[start : start + len(ids)] = ids
    return labels


def row_of(result: dict[str, Any], row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of the original after it has inserted the pictures."""
    ids: list[int] = []
    for kind, first, *counts in row["layout"]:
        ids += result["input_ids"][first : first + counts[0]] if kind == "text" else [IMAGE_TOKEN_ID] * counts[1]
    assert len(ids) == row["length"]
    return np.array(ids), labels_of(row, row["length"])


def same(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> bool:
    return all(np.array_equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def outcome(ours: tuple[np.ndarray, np.ndarray] | None, theirs: tuple[np.ndarray, np.ndarray] | None) -> str:
    """What became of a sample; None is a refusal."""
    if theirs is None:
        return REFUSED_BY_BOTH if ours is None else LEARNED_TOO
    if (theirs[1] == IGNORE_INDEX).all():
        return NOTHING if ours is None else LEARNED
    if ours is None:
        return REFUSED
    length = len(theirs[0])
    if length == LIMIT < len(ours[0]) and same((ours[0][:length], ours[1][:length]), theirs):
        return CUT
    return EQUAL if same(ours, theirs) else DIFFERENT


def answers_learned(sample: dict[str, Any], variant: str, golden: Path, labels: np.ndarray) -> bool:
    """Whether what we supervise is the assistant's words and their ends, no more and no less."""
    template, legacy = VARIANTS[variant]
    turns, _ = parse_llava(sample)
    expected = "".join(
        TEMPLATES[template].answer.format(answer=turn.text) + ("</s>" if TEMPLATES[template].ends else "")
        for turn in turns
        if turn.role == "assistant" and turn.text
    )
    decoded = tokenizer_of(golden, legacy).decode(labels[labels != IGNORE_INDEX])
    return decoded == (expected if template == "plain" else expected.removeprefix(" "))  # decoding takes one space for its own


def report(title: str, outcomes: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    counts = {what: list(outcomes.values()).count(what) for what in dict.fromkeys(outcomes.values())}
    with capsys.disabled():
        print(f"\n{title}, {len(outcomes)} samples: " + "; ".join(f"{count} {what}" for what, count in counts.items()), end="")


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_and_labels(golden: Path, variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {}
    for sample in golden_samples(golden):
        result, ours = sample["variants"][variant], encoded(sample, variant, golden, 1)
        theirs = None if result["error"] else (np.array(result["input_ids"]), labels_of(result, len(result["input_ids"])))
        outcomes[sample["id"]] = outcome(ours, theirs)
        assert ours is None or answers_learned(sample, variant, golden, ours[1]), sample["id"]
    expected = {name: what for name, (what, _) in LISTED[variant].items()} | dict.fromkeys(CUT_AS_TEXT[variant], CUT)
    assert {name: what for name, what in outcomes.items() if what not in (EQUAL, REFUSED_BY_BOTH)} == expected
    report(variant, outcomes, capsys)


# --- with the pictures inserted, at most 2048 positions

ALSO_EXPANDED: dict[str, Listed] = {
    "plain": {"special_text-unk-in-answer": (DIFFERENT, "the original drops `<unk>`, the id of its padding, from the row")},
    "llama_2": {"structure-only-gpt": (FAILS, "a text without any token")},
}
for _variant in VARIANTS:
    ALSO_EXPANDED.setdefault(_variant, {})
for _variant in ("llava_llama_2", "llama_2_legacy"):
    ALSO_EXPANDED[_variant] |= ALSO_EXPANDED["llama_2"]
for _variant in list(VARIANTS)[1:]:
    ALSO_EXPANDED[_variant]["structure-image-in-both-turns"] = (FAILS, "two placeholders and one picture")


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_with_pictures(golden: Path, variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {}
    for sample in golden_samples(golden):
        result = sample["variants"][variant]
        if result["error"]:
            continue  # there is no row
        ours = encoded(sample, variant, golden, FEATURES)
        row = result["expanded"]
        outcomes[sample["id"]] = FAILS if row["error"] else outcome(ours, row_of(result, row))
    listed = LISTED[variant] | dict.fromkeys(CUT_WITH_PICTURES[variant], (CUT, WHY_CUT)) | ALSO_EXPANDED[variant]
    expected = {name: what for name, (what, _) in listed.items() if name in outcomes}
    assert {name: what for name, what in outcomes.items() if what != EQUAL} == expected
    report(f"{variant} with pictures", outcomes, capsys)


def test_rows_of_batches(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = {sample["id"]: sample for sample in golden_samples(golden)}
    outcomes = {}
    for batch in map(json.loads, (golden / "llava" / "batches.jsonl").read_text().splitlines()):
        variant = batch["variant"]
        if batch["error"]:  # one sample of it has a placeholder too many; here the others are not affected
            assert "structure-image-in-both-turns" in batch["samples"]
            continue
        for name, row in zip(batch["samples"], batch["rows"], strict=True):
            theirs = row_of(samples[name]["variants"][variant], row)
            outcomes[f"{variant} {name}"] = outcome(encoded(samples[name], variant, golden, FEATURES), theirs)
    assert {name: what for name, what in outcomes.items() if what != EQUAL} == {
        f"{variant} {name}": what
        for variant in VARIANTS
        for name, (what, _) in (LISTED[variant] | dict.fromkeys(CUT_WITH_PICTURES[variant], (CUT, WHY_CUT))).items()
        if f"{variant} {name}" in outcomes
    }
    report("rows of batches", outcomes, capsys)


PICTURE = io.BytesIO()
Image.new("RGB", (4, 4)).save(PICTURE, "PNG")


def document_of(sample: dict[str, Any], variant: str, golden: Path, max_length: int) -> Document:
    template, legacy = VARIANTS[variant]
    turns, images = parse_llava(sample)
    layout = SampleFormat(WordTokenizer(), FEATURES, 14, (0.5, 0.5, 0.5))
    prepared = Sample(sample["id"], turns, [PICTURE.getvalue()] * len(images))
    return Preparation(template, "llava", "pad", max_length).document(prepared, tokenizer_of(golden, legacy), layout)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_original_cuts_inside_its_only_answer_is_refused(golden: Path, variant: str) -> None:
    """No long golden sample has a second round that could be dropped."""
    for sample in golden_samples(golden):
        if sample["id"] in CUT_WITH_PICTURES[variant]:
            with pytest.raises(BadSample, match=r"longer than data\.max_length = 2048 tokens even without its last turns"):
                document_of(sample, variant, golden, LIMIT)


UNDIVIDED = {
    *("structure-image-in-second-turn", "structure-image-end-of-second-turn", "long-image-placeholder-past-limit"),
    "empty-middle-answer",
}
"""The picture comes in the last round, or the round that is left has no answer: such a sample is refused."""


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "plain"])
def test_rounds_that_do_not_fit_are_dropped_whole_and_pictures_never_cut(golden: Path, variant: str) -> None:
    """Conversations of several rounds, with room for all of them but one token."""
    dropped = 0
    for sample in golden_samples(golden):
        whole = encoded(sample, variant, golden, FEATURES)
        if whole is None or len(parse_llava(sample)[0]) < 4:
            continue
        try:
            document = document_of(sample, variant, golden, len(whole[0]) - 1)
        except BadSample as error:
            assert sample["id"] in UNDIVIDED
            assert ("nothing to learn" if sample["id"] == "empty-middle-answer" else "longer than") in str(error)
            continue
        length = len(document.input_ids)
        assert same((document.input_ids, document.labels), (whole[0][:length], whole[1][:length]))
        assert document.truncated
        assert document.labels[-1] == 2  # ends with an answer
        assert (document.input_ids == IMAGE_TOKEN_ID).sum() == FEATURES * len(document.pixels)
        dropped += 1
    assert dropped == 21


# --- prompts for generation

PROMPTS_LISTED = {
    "vicuna_v1": {"empty-question-text": "the original takes an empty message for the place of the answer"},
    "llava_llama_2": {"empty-question-text": "the original demands a first message that is not empty"},
}


@pytest.mark.parametrize("conv_mode", PROMPTS_LISTED)
def test_prompts_and_histories(golden: Path, conv_mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_of(golden, legacy=False)
    outcomes, kinds = {}, []
    for sample in golden_samples(golden):
        generation = sample["generation"] or {}
        for kind in ("prompts", "history"):
            theirs = (generation.get(kind) or {}).get(conv_mode)
            if theirs is None:
                continue
            if kind == "prompts":
                images = ["picture"] if "image" in sample else []
                turns = [Turn("user", ("<image>\n" if images else "") + generation["question"])]
            else:
                turns, images = parse_llava(sample)
                turns = turns[:-1]
            ids = encode_prompt(turns, len(images), tokenizer, conv_mode, 1, IMAGE_TOKEN_ID)
            equal = not theirs.get("error") and ids.tolist() == theirs["input_ids"]
            name = sample["id"] if kind == "prompts" else f"history of {sample['id']}"
            outcomes[name] = EQUAL if equal else DIFFERENT
            kinds.append(kind)
    assert {name for name, what in outcomes.items() if what != EQUAL} == set(PROMPTS_LISTED[conv_mode])
    assert (kinds.count("prompts"), kinds.count("history")) == (127, 21)
    report(f"prompts and histories of {conv_mode}", outcomes, capsys)
