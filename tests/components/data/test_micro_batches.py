"""Micro-batches: what a sample becomes, where long ones are cut, and what happens to samples that cannot be used."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from components.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Batch
from components.chat_template import TEMPLATES
from components.data import InstructionData, LlavaConversations, Preparation, Sample, Source
from components.data.preparation import null_document
from components.data.quarantine import Quarantine
from components.errors import BadSample, RecipeError
from components.images import decode, square, to_square
from components.shapes_world import WORDS
from components.tokenizer import WordTokenizer
from components.turns import Turn
from tests.components.data.small_data import LAYOUT, TOKENIZER, end_workers, opened, shapes
from tests.components.small_tokenizers import chat_tokenizer
from tests.natural_pictures import jpegs

# --- what is in a batch


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "llava_llama_2", "brief"])
def test_templates_through_the_module(template: str, tmp_path: Path) -> None:
    data = opened({"shapes": shapes()}, tmp_path, template=template)
    batch = next(iter(data.train_dataloader()))
    assert batch.cumulative_lengths.tolist()[-1] == batch.num_tokens
    assert len(batch.pixels) == len(batch.sample_ids) == 8
    assert batch.image_positions.tolist() == (batch.input_ids == IMAGE_TOKEN_ID).nonzero()[:, 0].tolist()
    assert len(batch.image_positions) == 8 * 4
    bounds = batch.cumulative_lengths.tolist()
    for number, (first, last) in enumerate(pairwise(bounds)):
        sample = data.sources["shapes"].sample(int(batch.sample_ids[number].split()[1]), data.mixture.sample_stream(0))
        supervised = (batch.target_positions >= first) & (batch.target_positions < last)
        answers = TOKENIZER.decode(batch.targets[supervised])
        assert answers.rstrip("</s> ").endswith(sample.turns[-1].text)  # the caption is no matter of chance
        text = TOKENIZER.decode(batch.input_ids[first:last].clamp(min=0))
        assert TEMPLATES[template].first.split("{question}")[0].strip() in text
        assert (batch.position_ids[first:last] == torch.arange(last - first)).all()
        pixels = to_square(decode(sample.images[0]), 16, "pad", LAYOUT.image_mean)
        assert (batch.pixels[number].numpy() == pixels).all()


def test_plain_template_takes_captions(write, pictures: str, tmp_path: Path) -> None:
    records = [
        {
            "id": i,
            "image": f"p{i}.png",
            "conversations": [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": "a cross"}],
        }
        for i in range(10)
    ]
    data = opened(
        {"captions": LlavaConversations(write("c.json", records), pictures)}, tmp_path, template="plain", global_batch_size=1
    )
    batch = next(iter(data.train_dataloader()))
    assert batch.input_ids[1:5].tolist() == [IMAGE_TOKEN_ID] * 4
    assert TOKENIZER.decode(batch.targets) == "a cross\n"


def conversation(rounds: int, words: int, images: int = 1) -> Sample:
    turns = []
    for number in range(rounds):
        turns += [Turn("user", ("<image>\n" if number < images else "") + "what color"), Turn("assistant", "red " * words)]
    return Sample("long", turns, [shapes().sample(0, np.random.default_rng(0)).images[0]] * images)


@pytest.mark.parametrize("max_length", range(25, 145, 7))
def test_documents_are_cut_between_turns_and_never_inside_a_picture(max_length: int) -> None:
    preparation = Preparation("brief", "upright", "pad", max_length)
    whole = Preparation("brief", "upright", "pad", 10_000).document(conversation(10, 8), TOKENIZER, LAYOUT)
    document = preparation.document(conversation(10, 8), TOKENIZER, LAYOUT)
    length = len(document.input_ids)
    assert length <= max_length < len(whole.input_ids)
    assert (document.input_ids == whole.input_ids[:length]).all()
    assert (document.labels == whole.labels[:length]).all()
    assert document.labels[-1] == TOKENIZER.eos_token_id  # the last answer is whole
    assert document.truncated
    assert not whole.truncated
    assert (document.input_ids == IMAGE_TOKEN_ID).sum() == 4 * len(document.pixels) == 4


def test_a_document_that_cannot_be_cut_is_a_bad_sample() -> None:
    for sample, room in ((conversation(1, 50), 40), (conversation(3, 8, images=3), 40)):
        with pytest.raises(BadSample, match=r"longer than data\.max_length = 40 .* Raise max_length"):
            Preparation("brief", "upright", "pad", room).document(sample, TOKENIZER, LAYOUT)


def test_cutting_many_turns_takes_one_pass() -> None:
    """Tokenized once, whatever is dropped; and cut where a fresh encoding of the rounds that are left would end."""
    sample = conversation(400, 3)
    calls = []
    tokenizer = WordTokenizer(list(WORDS)).build()
    encode = tokenizer.encode
    tokenizer.encode = lambda text, **options: calls.append(text) or encode(text, **options)
    preparation = Preparation("vicuna_v1", "upright", "pad", 1000)
    ids, labels, truncated = preparation.encode(sample.turns, 1, tokenizer, LAYOUT)
    assert truncated and len(ids) <= 1000 and len(calls) <= len(sample.turns) + 50
    rounds = int((labels == tokenizer.eos_token_id).sum())
    again, labels_again, _ = preparation.encode(sample.turns[: 2 * rounds], 1, TOKENIZER, LAYOUT)
    assert (again == ids).all() and (labels_again == labels).all()
    longer = Preparation("vicuna_v1", "upright", "pad", 10_000).encode(sample.turns[: 2 * rounds + 2], 1, TOKENIZER, LAYOUT)
    assert len(longer[0]) > 1000


def test_half_of_a_character_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="half of a surrogate pair at position 3"):
        Preparation("brief", "upright", "pad", 100).encode(
            [Turn("user", "hi?\ud83d"), Turn("assistant", "red")], 0, TOKENIZER, LAYOUT
        )


def test_a_null_document_needs_no_special_token() -> None:
    bare = WordTokenizer(list(WORDS)).build()
    bare.bos_token = bare.eos_token = None
    assert null_document(LAYOUT, bare, "null").input_ids.tolist() == [0]


def test_prompts_end_where_the_answer_begins() -> None:
    preparation = Preparation("brief", "upright", "pad", 100)
    whole = conversation(2, 3)
    prompt = preparation.prompt(Sample("ask", whole.turns[:-1], whole.images), TOKENIZER, LAYOUT)
    document = preparation.document(whole, TOKENIZER, LAYOUT)
    assert (document.input_ids[: len(prompt.input_ids)] == prompt.input_ids).all()
    assert (prompt.labels == IGNORE_INDEX).all()
    assert TOKENIZER.decode(document.input_ids[len(prompt.input_ids) :]) == "red red red </s>"


def test_an_answer_ends_with_the_token_of_template_or_tokenizer() -> None:
    for template in ("brief", "plain"):  # plain has none of its own
        assert Preparation(template, "upright", "pad", 100).end_token_id(TOKENIZER) == TOKENIZER.eos_token_id
    endless = WordTokenizer().build()
    endless.eos_token = None
    with pytest.raises(RecipeError, match="Template plain has no end token and this tokenizer no eos_token"):
        Preparation("plain", "upright", "pad", 100).end_token_id(endless)


def test_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    """A folder with a chat template, through the module: what is learned are the answers and the template's end token."""
    chat_tokenizer("chatml").save_pretrained(tmp_path)
    layout = replace(LAYOUT, tokenizer=str(tmp_path))
    data = opened({"shapes": shapes()}, tmp_path, template="chat_template", layout=layout)
    batch = next(iter(data.train_dataloader()))
    text = data.tokenizer.decode(batch.targets)
    answers = text.split("<|im_end|>")[:-1]
    assert len(answers) == 8 * 3
    assert not any("<|im_start|>" in answer or "\n" in answer for answer in answers)
    assert data.preparation.end_token_id(data.tokenizer) == batch.targets[-1]


def test_fast_images_reach_the_pixels(tmp_path: Path) -> None:
    (picture,) = jpegs(1, (300, 500))
    sample = Sample("one", [Turn("user", "<image>"), Turn("assistant", "red")], [picture])
    layout = replace(LAYOUT, image_size=224)
    exact, fast = (
        Preparation("brief", "upright", "crop", 100, fast).document(sample, TOKENIZER, layout).pixels[0] for fast in (False, True)
    )
    assert (fast == square(picture, 224, "crop", LAYOUT.image_mean, fast=True)).all()
    assert (exact == square(picture, 224, "crop", LAYOUT.image_mean)).all()
    assert (fast != exact).any()
    data = opened({"shapes": shapes()}, tmp_path, fast_images=True)
    assert data.preparation.fast_images


# --- bad samples


def broken(how: str, write: Callable, pictures: str) -> dict[str, Source]:
    """Ten good conversations, of which the fourth is broken."""
    question = {"mismatch": "Which?", "extra": "<image> or <image>?"}.get(how, "<image>\nWhat?")
    answer = "" if how == "silent" else "a cross"
    records = [
        {"id": f"good {i}", "image": f"p{i}.png",
         "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cross"}]}
        for i in range(10)
    ]  # fmt: skip
    records[3] = {
        "id": "odd", "image": "p3.png",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }  # fmt: skip
    picture = Path(pictures) / "p3.png"
    if how == "missing":
        picture.unlink()
    elif how == "damaged":
        picture.write_bytes(picture.read_bytes()[:60])
    return {"own": LlavaConversations(write("train.jsonl", records), pictures)}


REASONS = {
    "missing": r"p3\.png cannot be read \(No such file or directory\)",
    "damaged": r"picture is damaged",
    "mismatch": r"0 <image> placeholder\(s\) but 1 image\(s\)",
    "extra": r"2 <image> placeholder\(s\) but 1 image\(s\)",
    "silent": r"nothing to learn",
}


def transferred(data: InstructionData) -> list[Batch]:
    batches = iter(data.train_dataloader())
    try:
        return [data.on_before_batch_transfer(batch, 0) for batch in batches]
    finally:
        end_workers(batches)


@pytest.mark.parametrize(("how", "workers"), [*((how, 0) for how in REASONS), ("damaged", 1)])
def test_a_bad_sample_ends_the_run_with_its_place_and_the_remedy(
    how: str, workers: int, write, pictures: str, tmp_path: Path
) -> None:
    data = opened(broken(how, write, pictures), tmp_path, num_workers=workers, global_batch_size=10)
    with pytest.raises(RecipeError, match=rf"train\.jsonl.* line 4, id odd: .*{REASONS[how]}") as caught:
        transferred(data)
    message = str(caught.value)
    assert "data.max_bad_fraction = 0 allowed; all are listed in" in message
    assert "Traceback" not in message
    assert message.count("id odd") == 1, message
    (written,) = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert (written["source"], written["step"]) == ("own", 0)
    assert written["reason"] in message


@pytest.mark.parametrize("how", REASONS)
def test_a_bad_sample_within_the_limit_is_skipped_and_written_down(how: str, write, pictures: str, tmp_path: Path) -> None:
    data = opened(broken(how, write, pictures), tmp_path / "run", max_bad_fraction=0.001, global_batch_size=10)
    batches = transferred(data)  # six epochs: the same bad sample again is not another one
    assert len(batches) == 6
    for batch in batches:
        place = next(i for i, name in enumerate(batch.sample_ids) if not name.startswith("good"))
        first, last = batch.cumulative_lengths[place : place + 2].tolist()
        assert last - first == 1
        assert batch.input_ids[first] == TOKENIZER.bos_token_id
        assert len(batch.sample_ids) == 10
        assert len(batch.pixels) == 9
        assert len(batch.image_positions) == 9 * 4
        assert not ((batch.target_positions >= first) & (batch.target_positions < last)).any()
    written = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert len(written) == 1
    assert written[0]["rank"] == 0
    assert "line 4, id odd" in written[0]["reason"]


def test_bad_samples_count_across_restarts(write, pictures: str, tmp_path: Path) -> None:
    sources = broken("missing", write, pictures)
    first = opened(sources, tmp_path, max_bad_fraction=0.001, global_batch_size=10)
    transferred(first)
    again = opened(sources, tmp_path, max_bad_fraction=0.001, global_batch_size=10)
    batch = transferred(again)[0]  # the known one is not another one
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1
    with pytest.raises(
        RecipeError, match=r"2 bad samples of 1000 of data\.sources\.own on this rank, data\.max_bad_fraction = 0\.001 allowed"
    ):
        again.on_before_batch_transfer(replace(batch, bad_samples=[("own", "another")]), 0)
    other_rank = opened(sources, tmp_path, rank=1, ranks=2, max_bad_fraction=0.001, global_batch_size=10)
    other_rank.on_before_batch_transfer(replace(batch, bad_samples=[("own", "another")]), 0)  # has a count of its own


def test_bad_samples_of_all_ranks_count_where_a_run_continues(tmp_path: Path) -> None:
    """700 of one rank's 100,000 draws are below a hundredth, on four ranks too; a line that was cut off stops nothing."""
    file = tmp_path / "quarantine.jsonl"
    alone = Quarantine(file, 0, 1, 0.01)
    for number in range(700):
        alone.add("web", f"picture {number}", 1, 100_000)
    file.write_text(file.read_text() + '{"step": 3, "rank": 0, "sou')
    for rank in range(4):
        four = Quarantine(file, rank, 4, 0.01)
        assert len(four.earlier) == 700
        for number in range(75):
            four.add("web", f"of rank {rank}, {number}", 1, 100_000)
        with pytest.raises(RecipeError, match=r"251 bad samples of 25000 of data\.sources\.web on this rank"):
            for number in range(75, 77):
                four.add("web", f"of rank {rank}, {number}", 1, 100_000)
        file.write_text("\n".join(file.read_text().splitlines()[:700]) + "\n")
    again = Quarantine(file, 0, 1, 0.001)
    again.add("other", "first", 1, 500)  # the share is taken of at least a thousand
    with pytest.raises(RecipeError, match="2 bad samples of 1000 of data"):
        again.add("other", "second", 1, 500)


def test_a_batch_of_nothing_but_bad_samples_is_a_batch(write, pictures: str, tmp_path: Path) -> None:
    sources = broken("missing", write, pictures)
    data = opened(sources, tmp_path, max_bad_fraction=0.001, global_batch_size=1)
    data.trainer.max_steps = 10
    batch = next(batch for batch in transferred(data) if batch.bad_samples)
    assert batch.num_tokens == 1
    assert len(batch.targets) == len(batch.pixels) == len(batch.image_positions) == 0
    assert batch.pixels.shape == (0, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_fault_of_a_sample_ends_the_run_in_its_own_words(workers: int, write, pictures: str, tmp_path: Path) -> None:
    """A disk that fails for good, inside a worker: no traceback, and nothing in the quarantine."""
    sources = broken("fine", write, pictures)
    data = opened(sources, tmp_path, num_workers=workers, global_batch_size=10, max_bad_fraction=0.5)

    def fail(name: str) -> bytes:
        raise RecipeError(f"picture {name} could not be read in 6 attempts")

    sources["own"].folder.read = fail
    with pytest.raises(RecipeError, match=r"^picture p\d\.png could not be read in 6 attempts$"):
        transferred(data)
    assert not (tmp_path / "quarantine.jsonl").exists()
