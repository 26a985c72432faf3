"""Names and configs of the layouts."""

import json
import re

import pytest
import torch
from llava_folders import LAYERS, ROWS, WORDS_KNOWN, hugging_face_folder, original_folder, state_of

from components.errors import RecipeError
from components.huggingface.layout import canonical, open_llava

NORMS = [f"{norm}.{kind}" for norm in ("layer_norm1", "layer_norm2") for kind in ("weight", "bias")]
RELEASED = {
    *(f"vision_tower.vision_model.{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")),
    "vision_tower.vision_model.embeddings.class_embedding",
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "vision_tower.vision_model.embeddings.position_embedding.weight",
    *(
        f"vision_tower.vision_model.encoder.layers.{layer}.{module}.{kind}"
        for layer in range(LAYERS)
        for module in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2", "layer_norm1",
            "layer_norm2",
        )
        for kind in ("weight", "bias")
    ),
    *(f"multi_modal_projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")),
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
    *(
        f"language_model.model.layers.{layer}.{module}.weight"
        for layer in range(2)
        for module in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
            "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
        )
    ),
}  # fmt: skip
"""The names of llava-hf/llava-1.5-7b-hf, for three and two layers."""


def test_the_folder_of_the_tests_has_the_names_of_the_releases(tmp_path):
    assert set(state_of(hugging_face_folder(tmp_path / "hf"))) == RELEASED


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_every_spelling_becomes_the_released_name(name):
    spellings = {name, f"model.{name}".replace("model.language_model.model.", "model.language_model.")}
    if name.startswith("vision_tower."):
        short = name.replace("vision_model.", "")
        spellings |= {short, f"model.{short}", f"model.vision_tower.{name}"}  # the last: LLaVA's own module around the tower
    elif name.startswith("language_model."):
        spellings = {name, name.removeprefix("language_model.")}
        spellings.add(name.replace("language_model.model.", "model.language_model."))
    else:
        layer, kind = re.fullmatch(r".*linear_(\d)\.(\w+)", name).groups()
        spellings |= {f"{prefix}mm_projector.{2 * int(layer) - 2}.{kind}" for prefix in ("", "model.", "base_model.model.model.")}
    assert {canonical(spelling) for spelling in spellings} == {name}


def test_what_is_computed_is_left_out():
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.vision_model.embeddings.position_ids"):
        assert canonical(name) is None


def test_layouts_are_told_apart(tmp_path):
    hf = hugging_face_folder(tmp_path / "hf")
    original = original_folder(tmp_path / "original", hf)
    apart = original_folder(tmp_path / "apart", hf, projector_apart=True)
    assert [open_llava(folder, "--weights").layout for folder in (hf, original, apart)] == ["hugging_face", "original", "original"]
    for folder in (hf, original, apart):
        opened = open_llava(folder, "--weights")
        assert opened.feature_block == -2
        assert set(opened.tensors.infos) <= RELEASED
        assert opened.holds("multi_modal_projector.")
        assert opened.holds("vision_tower.") == (folder is hf)
        assert opened.text_config.vocab_size == (ROWS if folder is hf else WORDS_KNOWN)
    lone = tmp_path / "lone"
    lone.mkdir()
    (apart / "mm_projector.bin").rename(lone / "mm_projector.bin")
    assert open_llava(lone, "--weights").layout == "projector"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ({"model_type": "llama"}, "is a llama model, not a LLaVA model.*weights.*pretrained"),
        ({"vision_config": {}, "text_config": {"model_type": "nothing"}}, "is not a LLaVA config"),
        ({"mm_hidden_size": 4, "architectures": ["LlavaMptForCausalLM"]}, "decoders of LlavaMptForCausalLM are not supported"),
        ({"mm_hidden_size": 4}, "holds no weights"),
    ],
)
def test_other_folders(config, message, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(RecipeError, match=f"--weights: .*{message}"):
        open_llava(tmp_path, "--weights")


def test_a_pickled_projector_with_code(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("the code ran",))

    torch.save({"model.mm_projector.0.weight": Code()}, tmp_path / "mm_projector.bin")
    with pytest.raises(RecipeError, match=r"mm_projector.bin holds code"):
        open_llava(tmp_path, "--weights")
