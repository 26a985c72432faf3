"""The peers of the step's benchmark compute what transformers' LLaVA does, and the benchmark says what it measured."""

import re

import numpy as np
import pytest
import torch
from tiny import DECODER_FROZEN, LLAMA, TOWER, TOWER_FROZEN, built_model, gradients

from components.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, pack
from components.vision_tower import OpenClipTower
from tests.benchmarks import step
from tests.benchmarks.peers import llava_style_loss, marked, padded, transformers_llava, transformers_loss
from tests.benchmarks.workloads import documents


@pytest.fixture
def model(request):
    tower = OpenClipTower(config={**TOWER, "layers": 3}, feature_layer=-2)
    return built_model(getattr(request, "param", TOWER_FROZEN), vision_tower=tower)


def some_documents(model, kind="instructions", samples=3):
    return documents(kind, samples, model.sample_format(), LLAMA["vocab_size"], seed=1)


@pytest.mark.parametrize("kind", ["captions", "instructions"])
def test_documents_are_a_picture_a_prompt_and_a_supervised_answer(model, kind):
    layout = model.sample_format()
    made = documents(kind, 400, layout, 256, seed=0)
    answers = []
    for document in made:
        supervised = document.labels != IGNORE_INDEX
        assert (document.labels[supervised] == document.input_ids[supervised]).all()
        assert (np.diff(np.flatnonzero(supervised)) == 1).all()
        assert (document.input_ids == IMAGE_TOKEN_ID).sum() == layout.tokens_per_image
        assert document.input_ids.max() < 255
        assert document.pixels.shape == (1, 3, layout.image_size, layout.image_size)
        answers.append(supervised.sum() - 1)
    shortest, median, longest = {"captions": (6, 24, 120), "instructions": (8, 110, 700)}[kind]
    assert min(answers) >= shortest
    assert max(answers) <= longest
    assert np.median(answers) == pytest.approx(median, rel=0.15)
    again = documents(kind, 2, layout, 256, seed=0)
    assert all((one.input_ids == other.input_ids).all() for one, other in zip(made[:2], again, strict=True))


@pytest.mark.parametrize("model", [TOWER_FROZEN, DECODER_FROZEN], ids=["full", "align"], indirect=True)
def test_peers_compute_the_same_loss_and_gradients(model):
    llava = transformers_llava(model)
    made = some_documents(model)
    batch = pack(made)
    losses = {
        "transformers": transformers_loss(model, llava, padded(made, model, "cpu")),
        "LLaVA style": llava_style_loss(model, llava, marked(made, model, "cpu")),
        "ours": model.loss_sum(batch) / len(batch.targets),
    }
    found = {}
    for name, loss in losses.items():
        model.zero_grad(set_to_none=True)
        loss.backward()
        found[name] = gradients(model)
        trained = {parameter for parameter, p in model.named_parameters() if p.requires_grad and "k_proj.bias" not in parameter}
        assert found[name].keys() == trained
    for name in ("LLaVA style", "ours"):
        assert losses[name].item() == pytest.approx(losses["transformers"].item(), rel=1e-5)
        for parameter, expected in found["transformers"].items():
            assert (found[name][parameter] - expected).norm() <= 1e-5 * expected.norm(), (name, parameter)


def test_transformers_takes_our_modules_and_a_frozen_tower_with_all_blocks(model):
    llava = transformers_llava(model)
    ours = {id(parameter) for parameter in [*model.decoder.parameters(), *model.projector.parameters()]}
    theirs = {id(parameter) for name, parameter in llava.named_parameters() if "vision_tower" not in name}
    assert theirs == ours
    assert not any(tensor.is_meta for tensor in [*llava.parameters(), *llava.buffers()])
    tower = llava.model.vision_tower
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert len(tower.encoder.layers) == 3
    assert len(model.vision_tower.blocks()) == 2
    assert model.decoder.lm.config._attn_implementation == "packed"


def test_collated_rows_hold_the_documents(model):
    made = some_documents(model)
    rows, markers = padded(made, model, "cpu"), marked(made, model, "cpu")
    for number, document in enumerate(made):
        size = len(document.input_ids)
        assert rows["attention_mask"][number].sum() == size
        assert rows["labels"][number, :size].tolist() == document.labels.tolist()
        assert (rows["labels"][number, size:] == IGNORE_INDEX).all()
        words = document.input_ids[document.input_ids != IMAGE_TOKEN_ID].tolist()
        kept = markers["input_ids"][number][markers["attention_mask"][number].bool()].tolist()
        assert kept == [words[0], IMAGE_TOKEN_ID, *words[1:]]
    assert (rows["input_ids"] == LLAMA["vocab_size"] - 1).sum() == 3 * model.sample_format().tokens_per_image
    assert torch.equal(rows["pixel_values"], markers["pixel_values"])


def test_an_id_that_stands_for_pictures_is_refused(model):
    made = some_documents(model)
    made[1].input_ids[-1] = LLAMA["vocab_size"] - 1
    with pytest.raises(ValueError, match="holds id 259"):
        padded(made, model, "cpu")


COLUMNS = [
    "", "tokens", "padded", "labels", "transformers, s", "ours, s", "LLaVA style", "ours", "logits of all tokens", "padded rows",
    "one mask for the row", "whole tower", "differ by",
]  # fmt: skip


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_every_step_and_how_far_they_are_apart():
    threads = torch.get_num_threads()
    text = step.main(["--workloads", "captions-28", "captions-28-align", "--samples", "2", "--rounds", "1"])
    assert torch.get_num_threads() == threads
    header, _, *rows = text.splitlines()[3:]
    assert cells(header) == COLUMNS
    assert [cells(row)[0] for row in rows] == ["captions, 28 px", "captions, 28 px, projector only"]
    for row in rows:
        found = dict(zip(COLUMNS, cells(row), strict=True))
        assert int(found["labels"]) < int(found["tokens"]) <= int(found["padded"])
        assert 0 < float(found["differ by"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("ours", lambda loss: loss * 1.001, "is 1.0e-03 off"),
        ("padded rows", lambda loss: loss + 0 * loss.detach() * float("nan"), "is nan off"),
    ],
)
def test_a_step_that_computes_something_else_is_not_timed(monkeypatch, name, wrong, words):
    steps = step.Case.steps.fget
    others = property(lambda case: {**steps(case), name: lambda: wrong(steps(case)[name]())})
    monkeypatch.setattr(step.Case, "steps", others)
    with pytest.raises(SystemExit, match=rf"{name}: .* {words}"):
        step.main(["--workloads", "captions-28", "--samples", "2", "--rounds", "1"])


def test_a_step_without_a_gradient_is_not_timed():
    expected = {"loss": torch.ones(()), "a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(SystemExit, match="ours: b has a gradient in one of the two steps only"):
        step.worst_difference("ours", {"loss": torch.ones(()), "a": torch.ones(2)}, expected)


@pytest.mark.parametrize("name", ["captions", "captions-225", "chats-224", "captions-224-frozen"])
def test_other_workloads_are_refused(name):
    with pytest.raises(SystemExit, match=f"{name} is no workload"):
        step.main(["--workloads", name])


def test_the_profile_says_where_the_time_goes():
    text = step.main(["--workloads", "captions-28", "--samples", "2", "--profile"])
    kinds = [cells(row)[0] for row in text.splitlines() if row.startswith("|")]
    assert {"matrix products", "attention"} <= set(kinds)
    # 6 of each weight and token in the decoder; projector, head and tower add little
    tokens, weights = int(re.search(r"(\d+) tokens", text)[1]), 4 * (4 * 192**2 + 3 * 192 * 512)
    assert 6e-9 * tokens * weights < float(re.search(r"([\d.]+) GFLOP:", text)[1]) < 6.5e-9 * tokens * weights
