"""The first samples of a run: what is at hand, and how long they are."""

import json

import numpy as np
import pytest
from PIL import Image

from components.batch import IGNORE_INDEX, SampleFormat
from components.data import InstructionData, LlavaConversations, ShapesWorld
from components.errors import RecipeError
from components.plan.assumptions import Assumptions
from components.plan.samples import MEASURED, FirstSamples
from components.shapes_world import WORDS, Setting
from components.tokenizer import WordTokenizer

LAYOUT = SampleFormat(WordTokenizer(list(WORDS)), tokens_per_image=4, image_size=16, image_mean=(0.5, 0.5, 0.5))
SMALL = Setting(grid=2, max_objects=2, image_size=16)


def data(sources, **changes):
    return InstructionData(sources, **{"template": "brief", "global_batch_size": 8, "seed": 3, **changes})


@pytest.fixture
def captions(tmp_path):
    """Eight captions of two words, of which the third has no picture file."""
    (tmp_path / "images").mkdir()
    records = []
    for number in range(8):
        if number != 2:
            Image.new("RGB", (20, 10), "red").save(tmp_path / f"images/{number}.png")
        said = [{"from": "human", "value": "<image>\ndescribe"}, {"from": "gpt", "value": "a red"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    (tmp_path / "captions.json").write_text(json.dumps(records))
    return LlavaConversations(str(tmp_path / "captions.json"), str(tmp_path / "images"), weight=1.0)


def test_shares_and_epochs_of_what_is_at_hand(captions):
    gone = LlavaConversations("nowhere/captions.json", "nowhere", weight=2.0)
    first = FirstSamples(data({"here": captions, "gone": gone, "drawn": ShapesWorld(SMALL, weight=1.0)}), LAYOUT, max_steps=125)
    assert [share.share for share in first.shares] == [0.25, 0.5, 0.25]
    assert [share.samples for share in first.shares] == [8, None, 1_000_000]
    assert [share.epochs for share in first.shares] == [1000 * 0.25 / 8, None, 1000 * 0.25 / 1e6]
    assert "nowhere/captions.json" in first.shares[1].missing and not first.shares[0].missing
    assert not first.complete
    assert first.lengths(Assumptions()) is None
    assert first.any_sample()[0].id == "0"


def test_the_mean_sample_is_that_of_the_documents_training_makes():
    first = FirstSamples(data({"drawn": ShapesWorld(SMALL, questions_per_scene=1)}), LAYOUT, max_steps=10)
    first.prepare()
    assert len(first.prepared) == MEASURED and first.complete
    lengths = first.lengths(Assumptions())
    ids = [prepared.document.input_ids for prepared in first.prepared]
    assert lengths.text_tokens == pytest.approx(np.mean([(row != LAYOUT.image_token_id).sum() for row in ids]))
    assert lengths.supervised_tokens == pytest.approx(
        np.mean([(prepared.document.labels != IGNORE_INDEX).sum() for prepared in first.prepared])
    )
    assert 0 < lengths.supervised_tokens < lengths.text_tokens
    assert lengths.images_per_sample == 1
    assert str(MEASURED) in lengths.origin


def test_samples_are_drawn_as_training_draws_them(captions):
    drawn = data({"here": captions, "drawn": ShapesWorld(SMALL, weight=1.0)})
    first = FirstSamples(drawn, LAYOUT, max_steps=10)
    first.prepare()
    kinds = ["scene" in prepared.sample.id for prepared in first.prepared]
    assert 0 < sum(kinds) < len(kinds)
    assert len(first.bad) + len(first.prepared) == MEASURED
    assert first.bad and all("2.png" in reason for reason in first.bad)


def test_what_is_stated_holds_and_needs_no_data():
    gone = LlavaConversations("nowhere/captions.json", "nowhere")
    layout = SampleFormat("no-such-owner/no-such-tokenizer", 4, 16, (0.5, 0.5, 0.5))
    first = FirstSamples(data({"gone": gone}), layout, max_steps=10)
    assert "no-such-owner/no-such-tokenizer" in first.no_tokenizer and not first.complete
    lengths = first.lengths(Assumptions(text_tokens=60.0))
    assert (lengths.text_tokens, lengths.supervised_tokens, lengths.images_per_sample) == (60, 60, 1)
    lengths = first.lengths(Assumptions(text_tokens=60.0, supervised_tokens=20.0, images_per_sample=0.5))
    assert (lengths.text_tokens, lengths.supervised_tokens, lengths.images_per_sample) == (60, 20, 0.5)


def test_a_template_that_does_not_suit_is_refused_as_training_refuses_it():
    with pytest.raises(RecipeError, match=r"data\.template = chat_template"):
        FirstSamples(data({"drawn": ShapesWorld(SMALL)}, template="chat_template"), LAYOUT, max_steps=10)
