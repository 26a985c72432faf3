"""LoRA: PEFT's adapters inside a decoder, what trains, what a checkpoint holds, and the way back to plain weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    ALL,
    DECODER_FROZEN,
    LLAMA,
    TOWER_FROZEN,
    Prepared,
    TinyModel,
    assert_equal,
    built_model,
    fill,
    gradients,
    tiny_batch,
    tiny_document,
    tiny_documents,
    tiny_model,
    tiny_trainer,
    weights,
)
from transformers import AutoModelForCausalLM

from components.batch import pack
from components.decoder import HuggingFaceDecoder, LoRA
from components.errors import RecipeError
from components.tokenizer import WordTokenizer
from components.vlm import LearningRates

# what get_peft_model asks transformers for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LORA = LoRA(rank=3, alpha=12.0, dropout=0.2)
KINDS = {
    "llama": {},
    "qwen2": {"model_type": "qwen2"},  # biases
    "phi3": {
        "model_type": "phi3",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },  # queries, keys and values in one layer
    "tied": {"tie_word_embeddings": True},
}
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def decoder(kind="llama", lora=LORA, adapted=True):
    """A decoder whose adapters matter, unless they are still to come."""
    built = HuggingFaceDecoder({**LLAMA, **KINDS[kind]}, WordTokenizer(), lora=lora)
    built.build()
    fill(built)
    if adapted:
        built.adapt()
        fill_adapted(built)
    return built.eval()


@torch.no_grad()
def fill_adapted(module):
    """Weights and adapters that change them by as much as they are: alpha / rank = 4 would let rounding grow with them."""
    fill(module, seed=1)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.mul_(0.5)


def logits(built, document):
    ids = torch.from_numpy(document.input_ids)
    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
    return built.head(built(built.embed(ids), torch.arange(len(ids)), ends, len(ids)))


class AdaptedModel(TinyModel):
    """The tiny model with adapters that are the same wherever it is built, and not zero."""

    def adapt(self):
        super().adapt()
        fill_adapted(self)


def lora_arguments(lora=LORA):
    return {"decoder": HuggingFaceDecoder(LLAMA, WordTokenizer(), lora=lora)}


# --- adapters


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_starts_as_what_it_was_without_adapters(kind):
    built, text = decoder(kind, adapted=False), tiny_document(9)
    before, plain = logits(built, text), copy.deepcopy(built.state_dict())
    built.adapt()
    assert torch.equal(logits(built, text), before)
    adapters = {name for name in built.state_dict() if "lora_" in name}
    assert adapters
    after = {name.replace(".base_layer.", "."): value for name, value in built.state_dict().items() if name not in adapters}
    assert after.keys() == plain.keys()
    assert all(torch.equal(after[name], plain[name]) for name in plain)
    fill(built, seed=1)
    assert not torch.allclose(logits(built, text), before)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_logits_and_gradients_are_those_of_peft(kind):
    ours = decoder(kind)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(decoder(kind, adapted=False).lm.config), attn_implementation="eager")
    theirs = get_peft_model(
        plain, LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=LORA.dropout, target_modules="all-linear")
    ).eval()
    theirs.load_state_dict({f"base_model.model.{name}": value for name, value in ours.lm.state_dict().items()})
    ours.requires_grad_(True)
    for text in (tiny_document(9), tiny_document(4)):
        labels = torch.from_numpy(text.input_ids)[None]
        loss = torch.nn.functional.cross_entropy(logits(ours, text)[:-1], labels[0, 1:])
        expected = theirs(input_ids=labels, labels=labels, use_cache=False).loss
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
    named = {name.removeprefix("base_model.model."): value for name, value in gradients(theirs).items()}
    assert named and all("lora_" in name and value.any() for name, value in named.items())
    assert_equal(gradients(ours.lm), named)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("all-linear", LAYERS),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["mlp.up_proj", "self_attn.o_proj"], {"up_proj", "o_proj"}),
    ],
)
def test_which_layers_are_adapted(wanted, expected):
    built = decoder(lora=LoRA(rank=2, alpha=2.0, target_modules=wanted))
    adapted = [name.removesuffix(".lora_A.default.weight") for name in built.state_dict() if name.endswith("lora_A.default.weight")]
    assert {name.rpartition(".")[2] for name in adapted} == expected
    assert len(adapted) == LLAMA["num_hidden_layers"] * len(expected)
    trained = sum(parameter.numel() for parameter in built.trainable_parameters())
    assert trained == sum(value.numel() for name, value in built.state_dict().items() if "lora_" in name)


@pytest.mark.parametrize("wanted", [["q_proj", "query"], ["lm_head"], ["proj"], ["embed_tokens"], ["model.layers.7.mlp.up_proj"]])
def test_a_name_of_no_layer(wanted):
    with pytest.raises(RecipeError) as raised:
        decoder(lora=LoRA(rank=2, alpha=2.0, target_modules=wanted))
    message = str(raised.value)
    assert message.startswith("model.decoder.init_args.lora.target_modules: ") and f"is called {wanted[-1]}." in message
    assert all(layer in message for layer in LAYERS)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}, {"target_modules": []}])
def test_values_out_of_range(wrong):
    with pytest.raises(RecipeError, match=f"model.decoder.init_args.lora: .*{next(iter(wrong))} "):
        LoRA(**{"rank": 2, "alpha": 2.0, **wrong})


def test_dropout_in_training_only():
    model = built_model(TOWER_FROZEN, **lora_arguments())
    fill(model.decoder, seed=1)
    torch.manual_seed(0)
    one, other = model.loss_sum(tiny_batch()), model.loss_sum(tiny_batch())
    assert one != other
    torch.manual_seed(0)
    assert model.loss_sum(tiny_batch()) == one
    model.eval()
    assert model.loss_sum(tiny_batch()) == model.loss_sum(tiny_batch())


def test_adapters_on_the_meta_device():
    real = decoder()
    with torch.device("meta"):
        built = HuggingFaceDecoder(LLAMA, WordTokenizer(), lora=LORA)
        built.build()
        built.adapt()
    assert all(parameter.is_meta for parameter in built.parameters())
    built.to_empty(device="cpu")
    built.load_state_dict(real.state_dict())
    built.eval().reset_buffers()
    assert torch.equal(logits(built, tiny_document(9)), logits(real, tiny_document(9)))


def test_generation_uses_the_adapters():
    built, ids = decoder(), torch.from_numpy(tiny_document(6).input_ids)
    answer = built.generate(built.embed(ids)[None].detach(), torch.ones(1, len(ids), dtype=torch.int64), 4, eos_token_id=2)[0]
    for token in answer:
        text = tiny_document(len(ids))
        text.input_ids = ids.numpy()
        assert logits(built, text)[-1].argmax() == token
        ids = torch.cat([ids, token[None]])


# --- training


def test_the_learning_rate_is_that_of_the_adapters():
    model = AdaptedModel(**arguments(TOWER_FROZEN))
    model.configure_model()
    named = dict(model.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    assert trained == {name for name in named if "lora_" in name or name.startswith("projector")}
    groups = {group["name"]: group for group in model.configure_optimizers().param_groups}
    assert groups.keys() == {"projector", "projector_no_decay", "decoder"}
    assert groups["decoder"]["lr"] == TOWER_FROZEN.decoder
    assert {id(p) for p in groups["decoder"]["params"]} == {id(named[name]) for name in trained if "lora_" in name}


def arguments(rates, lora=LORA, **overrides):
    model = tiny_model(rates)
    parts = {"vision_tower": model.vision_tower, "projector": model.projector, **lora_arguments(lora)}
    return {**parts, "learning_rates": rates, **overrides}


@pytest.mark.parametrize("rates", [TOWER_FROZEN, ALL, LearningRates(decoder=1e-3)], ids=["projector", "all", "adapters_alone"])
def test_a_step_changes_adapters_and_no_base_weight(rates):
    model = AdaptedModel(**arguments(rates, weight_decay=0.1))
    model.configure_model()
    before = weights(model)
    trainer = tiny_trainer()
    trainer.fit(model, datamodule=Prepared([tiny_batch(), tiny_batch(1)]))
    for name, value in weights(model).items():
        part = name.partition(".")[0]
        trained = getattr(rates, part) is not None and (part != "decoder" or "lora_" in name)
        assert torch.equal(value, before[name]) != trained, name
    assert len(trainer.optimizers[0].state) == sum(parameter.requires_grad for parameter in model.parameters())


def test_packed_equals_one_document_at_a_time():
    packed, single = (AdaptedModel(**arguments(TOWER_FROZEN)) for _ in range(2))
    for model in (packed, single):
        model.configure_model()
        model.eval()
    packed.loss_sum(tiny_batch()).backward()
    sum(single.loss_sum(pack([document])) for document in tiny_documents()).backward()
    assert_equal(gradients(packed), gradients(single))


def test_adapters_of_a_frozen_decoder():
    with pytest.raises(RecipeError, match=r"lora has no effect, since model\.learning_rates\.decoder is null"):
        tiny_model(DECODER_FROZEN, **lora_arguments())


class Meddler(HuggingFaceDecoder):
    """A decoder that trains one of its own weights beside the adapters."""

    def requires_grad_(self, requires_grad=True):
        super().requires_grad_(requires_grad)
        self.lm.lm_head.weight.requires_grad_(True)
        return self


def test_a_base_weight_that_trains_is_found():
    model = tiny_model(TOWER_FROZEN, decoder=Meddler(LLAMA, WordTokenizer(), lora=LORA))
    message = r"decoder\.lm\.lm_head\.weight should be frozen by model\.learning_rates\.decoder = 0\.003 and its lora"
    with pytest.raises(RecipeError, match=message):
        tiny_trainer().fit(model, datamodule=Prepared([tiny_batch()]))
