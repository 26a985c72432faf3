"""The page of a plan: what it shows is what the model reads, and what comes from outside stays text."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from components.batch import IGNORE_INDEX, SampleFormat
from components.data import InstructionData, LlavaConversations, Overrides, ShapesWorld
from components.errors import RecipeError
from components.plan.example import CONTEXT, SUPERVISED, VISUAL, example_of
from components.plan.render import page, token_texts, write
from components.plan.samples import FirstSamples
from components.shapes_world import WORDS, Setting
from components.tokenizer import WordTokenizer
from tests.components.small_tokenizers import KINDS, tokenizer_of

LAYOUT = SampleFormat(WordTokenizer(list(WORDS)), tokens_per_image=4, image_size=16, image_mean=(0.5, 0.5, 0.5))
NOWHERE = {"gone": LlavaConversations("nowhere/captions.json", "nowhere")}
HOSTILE = '</pre><script>alert("x")</script>'


class Reader(HTMLParser):
    """Texts of the spans of each class inside the tokens, pictures, and whatever could run or be fetched."""

    def __init__(self, text):
        super().__init__()
        self.spans, self.images, self.outside, self.inside, self.text = [], [], [], 0, ""
        self.widths = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.outside += [(tag, key) for key in attributes if key.startswith("on") or key in ("href", "srcset", "action")]
        self.outside += [tag] if tag in ("script", "iframe", "link", "object", "form") else []
        if tag == "img":
            head, data = attributes["src"].split(",")
            assert head == "data:image/png;base64"
            self.images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
        if tag == "div":
            self.inside += 1 if attributes.get("class") == "tokens" or self.inside else 0
            if "flex:" in attributes.get("style", ""):
                self.widths.append((attributes["class"].split()[0], int(attributes["style"].removeprefix("flex:"))))
        if tag == "span" and self.inside:
            self.spans.append([attributes["class"], ""])

    def handle_endtag(self, tag):
        self.inside -= 1 if tag == "div" and self.inside else 0

    def handle_data(self, data):
        self.text += data
        if self.inside and self.spans:
            self.spans[-1][1] += data

    def said(self, kind):
        return "".join(text for span, text in self.spans if span == kind).replace("↵", "")


def first_samples(sources, layout=LAYOUT, template="brief", **changes):
    first = FirstSamples(InstructionData(sources, template=template, global_batch_size=8, seed=3, **changes), layout, max_steps=10)
    if first.complete:
        first.prepare()
    return first


def own(tmp_path, question, answer, name="1"):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    (tmp_path / "own.json").write_text(json.dumps([{"id": name, "image": "red.png", "conversations": said}]))
    return {"own": LlavaConversations(str(tmp_path / "own.json"), str(tmp_path))}


def test_the_page_shows_what_is_read_and_what_is_supervised():
    first = first_samples({"drawn": ShapesWorld(Setting(grid=2, max_objects=2, image_size=16))})
    example = example_of(first, micro_batch=3)
    assert example.remarks == []
    reader = Reader(page("run", "the report", example))
    document, tokenizer = example.documents[0], first.tokenizer
    answers = [turn.text for turn in example.samples[0].turns if turn.role == "assistant"]
    assert reader.said(SUPERVISED) == "".join(f" {answer}</s>" for answer in answers)
    questions = [turn.text.replace("<image>\n", "") for turn in example.samples[0].turns if turn.role == "user"]
    assert all(question in reader.said(CONTEXT) for question in questions)
    assert reader.said(VISUAL) == "4 visual tokens"
    supervised = [kind for kind, _ in reader.spans].count(SUPERVISED)
    assert supervised == (document.labels != IGNORE_INDEX).sum()
    assert len(reader.spans) == len(document.input_ids) - 4 + 1
    assert "the report" in reader.text
    tower = reader.images[1].transpose(2, 0, 1)
    np.testing.assert_array_equal(tower, document.pixels[0])
    assert tokenizer is not None


def test_the_row_of_the_micro_batch_is_drawn_to_scale():
    first = first_samples({"drawn": ShapesWorld(Setting(grid=2, max_objects=2, image_size=16))})
    example = example_of(first, micro_batch=3)
    reader = Reader(page("run", "", example))
    assert sum(width for _, width in reader.widths) == sum(len(document.input_ids) for document in example.documents)
    assert sum(width for kind, width in reader.widths if kind == VISUAL) == 3 * 4
    assert f"The first 3 of 3 documents, end to end: {example.batch.num_tokens} tokens" in reader.text
    assert len(example.batch.targets) == sum(width for kind, width in reader.widths if kind == SUPERVISED)


def test_hostile_texts_stay_texts(tmp_path):
    first = first_samples(own(tmp_path, HOSTILE, HOSTILE, name=HOSTILE))
    reader = Reader(page(HOSTILE, HOSTILE, example_of(first, 1)))
    assert reader.outside == []
    assert HOSTILE in reader.said(SUPERVISED) and HOSTILE in reader.said(CONTEXT)


def test_a_sample_of_the_data_is_shown_even_without_its_tokenizer(tmp_path):
    layout = SampleFormat("no-such-owner/no-such-tokenizer", 4, 16, (0.5, 0.5, 0.5))
    example = example_of(first_samples(own(tmp_path, "what color is it", "red"), layout), 1)
    assert "no-such-owner" in " ".join(example.remarks)
    reader = Reader(page("run", "", example))
    assert reader.said(SUPERVISED) == " red</s>" and "no-such-owner" in reader.text


@pytest.mark.parametrize("template", ["plain", "llama_2", "chat_template"])
def test_a_scene_takes_the_place_of_data_that_are_elsewhere(template):
    layout = SampleFormat("no-such-owner/no-such-tokenizer", 4, 16, (0.5, 0.5, 0.5))
    example = example_of(first_samples(NOWHERE, layout, template, max_length=10), micro_batch=2)
    assert "no sample" in example.remarks[0] and len(example.documents) == 2
    assert any("brief" in remark for remark in example.remarks) == (template == "chat_template")
    reader = Reader(page("run", "", example))
    assert example.samples[0].turns[1].text in reader.said(SUPERVISED)
    assert ("Respond" in reader.text or "<<SYS>>" in reader.said(CONTEXT)) == (template == "llama_2")


def test_an_unknown_template_is_refused_even_without_data():
    layout = SampleFormat("no-such-owner/no-such-tokenizer", 4, 16, (0.5, 0.5, 0.5))
    with pytest.raises(RecipeError, match="vicuna_v1"):
        example_of(first_samples(NOWHERE, layout, "vicuna"), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_shown_with_the_spaces_they_bring(kind, request):
    tokenizer = tokenizer_of(kind, request)
    text = "what color is the red bus? 3.5 (no)\nred"
    shown = token_texts(tokenizer.encode(text, add_special_tokens=False), tokenizer)
    assert "".join(shown).removeprefix(" ") == text
    assert " red" in shown
    ids = tokenizer.encode("\N{HANGUL SYLLABLE GAG}", add_special_tokens=False)
    assert len(ids) > 1 and all(token_texts(ids, tokenizer))  # bytes of one character, each shown as its piece


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="--page"):
        write(tmp_path / "file" / "page.html", "")
    write(tmp_path / "new" / "page.html", "x")
    assert (tmp_path / "new" / "page.html").read_text() == "x"


def test_several_samples_are_shown_as_they_are_trained():
    first = first_samples({"drawn": ShapesWorld(Setting(grid=2, max_objects=2, image_size=16))})
    reader = Reader(page("run", "", example_of(first, 3, shown=3)))
    assert "the first 3 training samples" in reader.text and "The plan" not in reader.text
    answers = [turn.text for prepared in first.prepared[:3] for turn in prepared.sample.turns if turn.role == "assistant"]
    assert reader.said(SUPERVISED) == "".join(f" {answer}</s>" for answer in answers)
    towers = [image.transpose(2, 0, 1) for image in reader.images[1::2]]
    np.testing.assert_array_equal(np.stack(towers), np.concatenate([prepared.document.pixels for prepared in first.prepared[:3]]))
    assert "The first 3 of 3 documents, end to end" in reader.text


def test_each_sample_says_how_it_was_prepared():
    first = first_samples(
        {
            "drawn": ShapesWorld(Setting(grid=2, max_objects=2, image_size=16)),
            "squashed": ShapesWorld(Setting(grid=2, max_objects=2, image_size=16), overrides=Overrides(image_mode="squash")),
        }
    )
    modes = [prepared.preparation.image_mode for prepared in first.prepared[:8]]
    assert set(modes) == {"pad", "squash"}
    text = Reader(page("run", "", example_of(first, 8, shown=8))).text
    assert re.findall(r"pictures: (\w+) to 16 px", text) == modes
