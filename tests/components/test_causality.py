"""The causality probe: silent on every decoder that is causal, loud on one that is not, and gone without a trace."""

import time

import pytest
import torch
from lightning import Callback
from test_decoder import CONFIGS
from tiny import DECODER_FROZEN, LLAMA, TOWER_FROZEN, Prepared, built_model, tiny_batch, tiny_model, tiny_trainer
from transformers import LlavaConfig

from components.causality import prove_causal
from components.decoder import HuggingFaceDecoder, LoRA, attention
from components.tokenizer import WordTokenizer

MIXTURE = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}


def model_of(config, **arguments):
    return built_model(TOWER_FROZEN, decoder=HuggingFaceDecoder(config, WordTokenizer(), **arguments))


@pytest.mark.parametrize("name", CONFIGS)
def test_decoders_are_causal(name):
    assert prove_causal(model_of(CONFIGS[name])) == 0


def test_adapters_and_experts_are_causal():
    assert prove_causal(model_of(LLAMA, lora=LoRA(rank=2, alpha=4.0, dropout=0.5))) == 0
    assert prove_causal(model_of({**LLAMA, **MIXTURE})) < 1e-6


def test_weights_as_they_are_initialized_are_enough(monkeypatch):
    """Small weights, of which little passes through the attention."""
    model = built_model(DECODER_FROZEN)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1)
    assert prove_causal(model) == 0
    break_attention(monkeypatch)
    with pytest.raises(RuntimeError, match="not causal"):
        prove_causal(model)


def break_attention(monkeypatch, leak="future"):
    """The last token of a document is seen by those before it, by the next document, or by the one before."""
    per_document = attention._per_document

    def broken(query, key, value, ends, scaling, window):
        output = per_document(query, key, value, ends, scaling, window)
        seen = {
            "future": slice(int(ends[1]), int(ends[2]) - 1),
            "next": slice(int(ends[2]), None),
            "before": slice(0, int(ends[1])),
        }
        last = value[:, :, int(ends[2]) - 1].repeat_interleave(query.shape[1] // value.shape[1], 1)
        output[:, seen[leak]] += 0.1 * last[:, None]
        return output

    monkeypatch.setattr(attention, "_per_document", broken)


@pytest.mark.parametrize("leak", ["future", "next", "before"])
def test_a_leak_is_found(leak, monkeypatch):
    model = model_of(LLAMA)
    break_attention(monkeypatch, leak)
    with pytest.raises(RuntimeError, match=r"not causal: another token at position 11 .* changes the logits of position") as raised:
        prove_causal(model)
    assert "copy.deepcopy(lm.config)" in str(raised.value)


def test_a_document_without_a_mask_is_found(monkeypatch):
    def unmasked(query, key, value, ends, scaling, window):
        lengths, groups = ends.diff().tolist(), query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        split = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([torch.nn.functional.scaled_dot_product_attention(*one) for one in split], 2).transpose(1, 2)

    model = model_of(LLAMA)
    monkeypatch.setattr(attention, "_per_document", unmasked)
    with pytest.raises(RuntimeError, match="not causal"):
        prove_causal(model)


def test_a_config_shared_with_another_model_is_found(monkeypatch):
    """What transformers does to a model whose config is given to a second one, with and without the guard of packed attention."""
    model = model_of(LLAMA)
    LlavaConfig(text_config=model.decoder.lm.config)
    with pytest.raises(RuntimeError, match="copy.deepcopy"):
        prove_causal(model)

    model = model_of(LLAMA)
    config = model.decoder.lm.config
    monkeypatch.setattr("components.decoder.attention.PACKED", None)  # the guard compares with it
    LlavaConfig(text_config=config)
    with pytest.raises(RuntimeError, match="not causal"):
        prove_causal(model)


def test_logits_that_are_no_numbers_or_show_nothing():
    model = model_of(LLAMA)
    with torch.no_grad():
        model.decoder.lm.lm_head.weight.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="not finite"):
            prove_causal(model)
        model.decoder.lm.lm_head.weight.zero_()
        with pytest.raises(RuntimeError, match="do not depend on its tokens"):
            prove_causal(model)


def test_the_model_is_left_as_it_was():
    model = model_of(LLAMA, lora=LoRA(rank=2, alpha=4.0, dropout=0.5))
    model.loss_sum(tiny_batch()).backward()
    model.projector.eval()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    prove_causal(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named.items())
    assert all(torch.equal(dict(model.named_parameters())[name].grad, gradient) for name, gradient in gradients.items())
    assert [m.training for m in model.modules()] == modes and True in modes and False in modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_modes_are_back_after_an_error(monkeypatch):
    model = model_of(LLAMA)
    break_attention(monkeypatch)
    with pytest.raises(RuntimeError):
        prove_causal(model)
    assert model.decoder.training


def test_it_takes_milliseconds():
    model = model_of(LLAMA)
    prove_causal(model)
    start = time.perf_counter()
    prove_causal(model)
    assert time.perf_counter() - start < 0.2


class SharesItsConfig(Callback):
    """Makes a config of another model around the decoder's own, as an exporter may."""

    def on_fit_start(self, trainer, pl_module):
        LlavaConfig(text_config=pl_module.decoder.lm.config)


def test_a_fit_does_not_start_with_a_decoder_that_is_not_causal(monkeypatch):
    with pytest.raises(RuntimeError, match="copy.deepcopy"):
        tiny_trainer(callbacks=[SharesItsConfig()]).fit(tiny_model(), datamodule=Prepared([tiny_batch()]))
    model = tiny_model()
    model.configure_model()
    break_attention(monkeypatch)
    with pytest.raises(RuntimeError, match="not causal"):
        tiny_trainer().fit(model, datamodule=Prepared([tiny_batch()]))


def test_the_precision_of_the_run_is_the_one_that_is_tried(monkeypatch):
    def first_attention(query, *others):
        raise ZeroDivisionError(query.dtype)

    def too_late(*_):
        raise AssertionError

    model = tiny_model()
    monkeypatch.setattr(attention, "_per_document", first_attention)
    monkeypatch.setattr(model, "on_train_batch_start", too_late)  # the probe comes before
    with pytest.raises(ZeroDivisionError, match="bfloat16"):
        tiny_trainer(precision="bf16-mixed").fit(model, datamodule=Prepared([tiny_batch()]))
