"""Cross-entropy in pieces against all positions at once: the loss and every gradient, whatever the head is."""

import pytest
import torch
from tiny import (
    ALL,
    DECODER_FROZEN,
    LLAMA,
    Prepared,
    Record,
    assert_equal,
    built_model,
    gradients,
    tiny_batch,
    tiny_document,
    tiny_model,
    tiny_trainer,
    weights,
)
from torch import nn
from torch.nn import functional

from components import loss
from components.batch import pack
from components.decoder import HuggingFaceDecoder, LoRA
from components.loss import cross_entropy_sum, pieces_of
from components.tokenizer import WordTokenizer

VOCABULARY = LLAMA["vocab_size"]


@pytest.fixture
def in_pieces(monkeypatch):
    """Logits of seven positions at a time, which divides no batch here."""
    monkeypatch.setattr(loss, "MOST_LOGITS", 7 * VOCABULARY + 1)


def test_pieces():
    assert [pieces_of(positions, 32_000) for positions in (0, 1, 4194, 4195, 8388, 8389)] == [1, 1, 1, 2, 2, 3]


def plain(head, hidden, targets):
    return functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("positions", [0, 1, 7, 8, 50])
def test_pieces_equal_all_at_once(in_pieces, positions, frozen):
    generator = torch.Generator().manual_seed(positions)
    head = nn.Linear(32, VOCABULARY).requires_grad_(not frozen)
    targets = torch.randint(0, VOCABULARY, (positions,), generator=generator)
    found = []
    for compute in (lambda *given: cross_entropy_sum(*given, VOCABULARY), plain):
        hidden = torch.randn(positions, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        value = compute(head, hidden, targets)
        value.backward()
        grads = {name: parameter.grad for name, parameter in head.named_parameters() if parameter.grad is not None}
        found.append({"loss": value.detach(), "hidden": hidden.grad, **grads})
        head.zero_grad()
    assert len(found[0]) == (2 if frozen else 4)
    if positions:
        assert_equal(*found, 1e-6)
    assert found[0]["loss"] == 0 or positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_logits_are_not_cut(dtype):
    head, hidden, targets = nn.Linear(32, VOCABULARY, dtype=dtype), torch.randn(50, 32, dtype=dtype), torch.arange(50)
    assert torch.equal(cross_entropy_sum(head, hidden, targets, VOCABULARY), plain(head, hidden, targets))


def largest_storage(compute) -> int:
    """Bytes of the largest tensor that autograd keeps."""
    found = [0]

    def keep(tensor):
        found.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return max(found)


def test_no_logits_are_kept(in_pieces):
    head, hidden, targets = nn.Linear(8, VOCABULARY), torch.randn(50, 8, requires_grad=True), torch.arange(50)
    assert largest_storage(lambda: plain(head, hidden, targets)) == 50 * VOCABULARY * 4
    widest: list[int] = []
    kept = largest_storage(lambda: cross_entropy_sum(lambda h: widest.append(len(h)) or head(h), hidden, targets, VOCABULARY))
    assert kept == 50 * 8 * 4
    assert max(widest) == 7 and sum(widest) == 50


def decoder(**options):
    return HuggingFaceDecoder({**LLAMA, **options.pop("config", {})}, WordTokenizer(), **options)


MODELS = {
    "all": (ALL, lambda: decoder()),
    "tied": (ALL, lambda: decoder(config={"tie_word_embeddings": True})),
    "decoder frozen": (DECODER_FROZEN, lambda: decoder()),
    "adapters": (ALL, lambda: decoder(lora=LoRA(rank=2, alpha=2.0))),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_in_pieces(kind, autocast, monkeypatch):
    rates, make = MODELS[kind]
    batch, found = tiny_batch(), []
    assert len(batch.targets) > 14
    for most in (loss.MOST_LOGITS, 7 * VOCABULARY):
        monkeypatch.setattr(loss, "MOST_LOGITS", most)
        model = built_model(rates, decoder=make())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = model.loss_sum(batch)
        value.backward()
        found.append({"loss": value.detach(), **gradients(model)})
    assert_equal(found[1], found[0], 1e-2 if autocast else 1e-5)


def test_dropout_of_a_head_is_drawn_once(in_pieces):
    """The logits that backward computes again are those of the forward pass."""
    dropped = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, VOCABULARY))
    targets, seen = torch.arange(20), []
    cross_entropy_sum(
        lambda h: seen.append(dropped(h)) or seen[-1], torch.ones(20, 16, requires_grad=True), targets, VOCABULARY
    ).backward()
    forward, backward = seen[:3], seen[:2:-1]
    assert len(seen) == 6
    for one, again in zip(forward, backward, strict=True):
        assert torch.equal(one, again)


def test_training_and_validation_in_pieces(monkeypatch):
    batches = [pack([tiny_document(9, (0,), seed), tiny_document(14, (), seed)]) for seed in range(4)]
    runs = []
    for most in (loss.MOST_LOGITS, 5 * VOCABULARY):
        monkeypatch.setattr(loss, "MOST_LOGITS", most)
        model, record = tiny_model(), Record()
        tiny_trainer(2, callbacks=[record]).fit(model, datamodule=Prepared(batches))
        with torch.no_grad():
            runs.append((weights(model), record.series("train/loss"), model.loss_sum(batches[0]).item()))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)
    assert runs[0][2] == pytest.approx(runs[1][2], rel=1e-6)
    assert_equal(runs[1][0], runs[0][0], 1e-3)
