"""The architecture stated in a recipe and the weights it names: what does not fit is an error that says so."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from components.decoder import HuggingFaceDecoder
from components.errors import RecipeError
from components.sharding import give_memory
from components.tokenizer import WordTokenizer

WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 128,
}
LLAMA = {"model_type": "llama", **WIDTHS}
IDS = torch.arange(3, 20)


def built(**changes) -> HuggingFaceDecoder:
    torch.manual_seed(0)
    decoder = HuggingFaceDecoder({**LLAMA, **changes}, WordTokenizer())
    decoder.build()
    return decoder


def logits(decoder: HuggingFaceDecoder) -> torch.Tensor:
    ends = torch.tensor([0, len(IDS)], dtype=torch.int32)
    return decoder.head(decoder(decoder.embed(IDS), torch.arange(len(IDS)), ends, len(IDS)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**LLAMA, "num_hiden_layers": 2},
            "config.num_hiden_layers is not a key of LlamaConfig. Did you mean num_hidden_layers",
        ),
        ({**LLAMA, "dtype": "bfloat16"}, "config.dtype has no effect"),
        ({**LLAMA, "rope_parameters": {"rope_thet": 1e6}}, "rope_parameters.rope_thet .* Did you mean rope_theta"),
        ({**WIDTHS}, "model_type None"),
        ({**WIDTHS, "model_type": "lama"}, "model_type 'lama'.* Did you mean llama"),
        ({**LLAMA, "hidden_size": "wide"}, "not a possible LlamaConfig: .*hidden_size"),
        ({**LLAMA, "num_attention_heads": 5}, "not a possible LlamaConfig: The hidden size"),
    ],
)
def test_mistakes_in_the_config(config, message):
    with pytest.raises(RecipeError, match=message):
        HuggingFaceDecoder(config, WordTokenizer())


def test_legacy_rope_keys_are_understood_and_the_recipe_is_left_as_it_is():
    config = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    before = copy.deepcopy(config)
    decoder = HuggingFaceDecoder(config, WordTokenizer())
    decoder.build()
    assert decoder.lm.config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert config == before


@pytest.mark.parametrize("tied", [False, True])
def test_weights_equal_the_transformers_model(tmp_path, tied):
    source = built(tie_word_embeddings=tied)
    released = AutoModelForCausalLM.from_config(copy.deepcopy(source.lm.config), attn_implementation="sdpa").eval()
    released.generation_config.temperature = 0.9  # as Vicuna's says, without sampling
    torch.manual_seed(7)
    for parameter in released.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    expected = released(input_ids=IDS[None]).logits[0]
    released.generation_config.temperature = None
    released.save_pretrained(tmp_path)

    for device in ("cpu", "meta"):
        decoder = HuggingFaceDecoder({**LLAMA, "tie_word_embeddings": tied}, WordTokenizer(), weights=str(tmp_path))
        with torch.device(device):
            decoder.build()
        give_memory(decoder, torch.device("cpu"))
        decoder.reset_buffers()
        decoder.load_weights()
        decoder.eval()
        torch.testing.assert_close(logits(decoder), expected, rtol=1e-5, atol=1e-5)
        assert (decoder.lm.lm_head.weight is decoder.lm.model.embed_tokens.weight) == tied
        assert {parameter.device.type for parameter in decoder.parameters()} == {"cpu"}
        assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in decoder.parameters())


def test_no_weights_keep_the_built_ones():
    decoder = built()
    before = copy.deepcopy(decoder.state_dict())
    decoder.load_weights()
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


def test_weights_with_another_config_name_every_key(tmp_path):
    built(rms_norm_eps=1e-5, rope_theta=5e5).lm.save_pretrained(tmp_path)
    decoder = HuggingFaceDecoder({**LLAMA, "rope_theta": 1e4}, WordTokenizer(), weights=str(tmp_path))
    decoder.build()
    with pytest.raises(RecipeError) as caught:
        decoder.load_weights()
    lines = str(caught.value).splitlines()
    assert "rms_norm_eps: 1e-06 by default, 1e-05 in the weights" in lines[1]
    assert lines[2].startswith("  rope_parameters:") and "in the recipe" in lines[2] and "500000" in lines[2]
    assert len(lines) == 3


def test_weights_of_another_architecture(tmp_path):
    built(model_type="qwen2").lm.save_pretrained(tmp_path)
    decoder = HuggingFaceDecoder(LLAMA, WordTokenizer(), weights=str(tmp_path))
    decoder.build()
    with pytest.raises(RecipeError, match="model_type: 'llama' in the recipe, 'qwen2' in the weights"):
        decoder.load_weights()


def test_weights_that_do_not_fit_are_listed(tmp_path):
    source = built()
    tensors = dict(source.lm.state_dict())
    tensors["model.stray.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    del tensors["model.norm.weight"]
    source.lm.save_pretrained(tmp_path, state_dict=tensors)
    decoder = HuggingFaceDecoder(LLAMA, WordTokenizer(), weights=str(tmp_path))
    decoder.build()
    with pytest.raises(RecipeError) as caught:
        decoder.load_weights()
    message = str(caught.value)
    assert "model.decoder.init_args.weights: the tensors of" in message
    assert "missing: model.norm.weight (32,)" in message
    assert "unexpected: model.stray.weight (1,)" in message
    assert "mismatched: lm_head.weight is (3, 3), should be (260, 32)" in message


def test_weights_cut_short_by_a_broken_download(tmp_path):
    built().lm.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    decoder = HuggingFaceDecoder(LLAMA, WordTokenizer(), weights=str(tmp_path))
    decoder.build()
    with pytest.raises(RecipeError, match="No decoder weights could be read"):
        decoder.load_weights()


def test_weights_that_are_not_there(tmp_path):
    decoder = HuggingFaceDecoder(LLAMA, WordTokenizer(), weights=str(tmp_path / "absent"))
    decoder.build()
    with pytest.raises(RecipeError, match="model.decoder.init_args.weights"):
        decoder.load_weights()


def test_a_config_as_published_fits_the_same_architecture_in_the_recipe(tmp_path):
    source = built(rope_theta=5e5)
    source.lm.save_pretrained(tmp_path)
    published = {
        "_name_or_path": "somewhere",
        "architectures": ["LlamaForCausalLM"],
        **LLAMA,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.01,
        "max_sequence_length": 2048,  # some releases say more than transformers knows
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    decoder = HuggingFaceDecoder({**LLAMA, "rope_parameters": {"rope_theta": 500000}}, WordTokenizer(), weights=str(tmp_path))
    decoder.build()
    torch.nn.init.zeros_(decoder.lm.lm_head.weight)
    decoder.load_weights()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in decoder.state_dict().items())
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
