"""Released decoders read tensor by tensor: to the last bit what transformers makes of the same files."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_decoder_weights import LLAMA
from transformers import AutoModelForCausalLM

from components.decoder import HuggingFaceDecoder
from components.errors import RecipeError
from components.sharding import demand_finite, give_memory
from components.tokenizer import WordTokenizer

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KINDS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", **TOKENS},
    "gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "experts": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "other experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def released(kind, folder, dtype=torch.float32, **options):
    """A model with random weights, written by transformers, and the decoder that names them."""
    config = {**LLAMA, **KINDS[kind]}
    decoder = HuggingFaceDecoder(config, WordTokenizer(), weights=str(folder))
    decoder.build()
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    copy.deepcopy(decoder.lm).to(dtype).save_pretrained(folder, **options)
    return HuggingFaceDecoder(config, WordTokenizer(), weights=str(folder))


def read(decoder):
    """The decoder as a run starts with it."""
    with torch.device("meta"):
        decoder.build()
    give_memory(decoder, torch.device("cpu"))
    decoder.reset_buffers()
    decoder.load_weights()
    demand_finite(decoder)
    return decoder


def assert_as_transformers_reads(decoder):
    theirs = AutoModelForCausalLM.from_pretrained(decoder.weights, dtype=torch.float32)
    ours = read(decoder).lm
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert all(torch.equal(value, dict(ours.named_buffers())[name]) for name, value in theirs.named_buffers())
    shared = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == shared


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_decoders(kind, tmp_path):
    assert_as_transformers_reads(released(kind, tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_several_files_of_16_bits(dtype, tmp_path):
    decoder = released("llama", tmp_path, dtype, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_as_transformers_reads(decoder)


def rewrite(folder, change, suffix="safetensors"):
    """Other tensors in the place of a folder's."""
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    file.unlink()
    if suffix == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, file, metadata={"format": "pt"})


def test_a_pickle(tmp_path):
    decoder = released("llama", tmp_path, torch.float16)
    rewrite(tmp_path, lambda tensors: tensors, "bin")
    assert_as_transformers_reads(decoder)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    ],
    ids=["old buffers", "the model without its head", "a head besides the table"],
)
def test_old_and_partial_releases(change, tmp_path):
    decoder = released("tied", tmp_path)
    rewrite(tmp_path, change)
    assert_as_transformers_reads(decoder)


def test_a_head_that_should_be_the_table_and_is_another(tmp_path):
    decoder = released("tied", tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(RecipeError, match=r"init_args.weights: model.embed_tokens.weight and lm_head.weight differ in"):
        read(decoder)


@pytest.mark.parametrize("gone", ["experts.2.up", "experts.2.", "experts."])
def test_a_missing_expert(gone, tmp_path):
    decoder = released("experts", tmp_path)
    rewrite(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if f"layers.1.mlp.{gone}" not in name})
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.mlp\.experts\."):
        read(decoder)


def test_a_folder_without_weights(tmp_path):
    decoder = released("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"(?s)No decoder weights could be read from .* holds no model.safetensors"):
        read(decoder)
