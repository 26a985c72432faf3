"""What the vision tower refuses of a Hugging Face folder or hub id: another encoder, damaged files, code, nothing at all."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_towers import (
    TINY,
    add_tiny_siglip,
    bare,
    built,
    hugging_face_model,
    reconfigured,
    rewritten,
    saved,
)

from components.errors import RecipeError
from components.vision_tower import OpenClipTower

QUICK = {**TINY, "quick_gelu": True}
KEY = "model.vision_tower.init_args.pretrained"


@pytest.fixture
def folder(tmp_path):
    """A CLIP folder whose encoder is that of QUICK."""
    return saved(hugging_face_model(), tmp_path / "clip")


def refusal(pretrained, **architecture):
    """What load_weights says; nothing may have been copied before."""
    tower = OpenClipTower(pretrained=str(pretrained), **(architecture or {"config": QUICK}))
    tower.build()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    with pytest.raises(RecipeError) as error:
        tower.load_weights()
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())
    return str(error.value)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: gelu there, quick_gelu in the recipe"),
        ({"num_attention_heads": 2}, "num_attention_heads: 2 there, 4 in the recipe"),
        ({"num_attention_heads": None}, "num_attention_heads: 12 there, 4 in the recipe"),
        ({"num_hidden_layers": 5}, "num_hidden_layers: 5 there, 4 in the recipe"),
        ({"hidden_size": 32}, "hidden_size: 32 there, 64 in the recipe"),
        ({"intermediate_size": 128}, "intermediate_size: 128 there, 256 in the recipe"),
        ({"patch_size": 16}, "patch_size: 16 there, 8 in the recipe"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps: 1e-06 there, 1e-05 in the recipe"),
        ({"model_type": "siglip_vision_model"}, "model_type: siglip_vision_model there, clip_vision_model in the recipe"),
        ({"model_type": "llama"}, "is a llama model (config.json). Name a CLIP, SigLIP or LLaVA model."),
    ],
)
def test_another_architecture(stated, message, folder):
    said = refusal(reconfigured(folder, **stated))
    assert said.startswith(f"{KEY}: {folder} is ") and message in said


def test_a_section_without_type_is_that_of_its_model(folder):
    vision = json.loads((folder / "config.json").read_text())
    vision.pop("model_type")
    built(config=QUICK, pretrained=str(reconfigured(folder, model_type="llava", vision_config=vision)))
    said = refusal(reconfigured(folder, model_type="siglip", vision_config=vision))
    assert "model_type: siglip_vision_model there" in said


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("processor_config.json", {"image_processor": {"image_std": [0.5, 0.5, 0.5]}}),
    ],
)
def test_other_colors(name, stated, folder):
    (folder / name).write_text(json.dumps(stated))
    assert f"(0.5, 0.5, 0.5) in {name}, (0." in refusal(folder)


def test_the_same_colors(folder):
    colors = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colors))
    built(config=QUICK, pretrained=str(folder))


@pytest.mark.parametrize("name", ["encoder.layers.1.mlp.fc1.bias", "encoder.layers.3.mlp.fc1.bias", "post_layernorm.weight"])
def test_a_tensor_that_is_missing(name, folder):
    """Those that only an export needs too."""
    rewritten(folder, lambda state: {other: tensor for other, tensor in state.items() if bare(other) != name})
    said = refusal(folder)
    assert "(1 differences)" in said and f"missing: {name} (" in said


def test_a_tensor_that_nobody_knows(folder):
    rewritten(folder, dict, {"encoder.layers.0.mlp.fc3.bias": torch.zeros(2)})
    assert "unexpected: encoder.layers.0.mlp.fc3.bias (2,)" in refusal(folder)


@pytest.mark.parametrize("shape", [(16, 64), (18, 64), (17, 32), (17,)])
def test_a_position_table_that_is_no_grid(shape, folder):
    rewritten(folder, dict, {"embeddings.position_embedding.weight": torch.zeros(shape)})
    assert f"mismatched: embeddings.position_embedding.weight is {shape}, should be (17, 64)" in refusal(folder)


def test_siglip_is_not_resized_and_its_activation_not_exchanged(tmp_path, monkeypatch):
    larger = saved(hugging_face_model("siglip_vision_model", image_size=64), tmp_path / "larger")
    exact = saved(hugging_face_model("siglip_vision_model", hidden_act="gelu"), tmp_path / "exact")
    name = add_tiny_siglip(monkeypatch, "gelu_tanh")
    assert "image_size: 64 there, 32 in the recipe" in refusal(larger, model_name=name)
    assert "hidden_act: gelu there, gelu_pytorch_tanh in the recipe" in refusal(exact, model_name=name)


def test_a_file_cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file} is damaged or cut short" in refusal(folder)


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_code_is_refused_and_not_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    state = load_file("model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, "extra": Payload()}, "pytorch_model.bin")
    assert "holds code, not only tensors, and is not opened" in refusal(folder)
    assert not (folder / "executed").exists()


def test_no_config_no_weights_no_tower(folder):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    assert "holds no model.safetensors and no pytorch_model.bin" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json does not exist" in refusal(folder)


ORIGINAL = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 4096}


def original(folder, prefix):
    (folder / "config.json").write_text(json.dumps(ORIGINAL))
    others = {"model.embed_tokens.weight": torch.zeros(3, 2), "model.mm_projector.0.bias": torch.zeros(2)}
    return rewritten(
        folder, lambda state: {prefix + bare(name): tensor for name, tensor in state.items()} if prefix else {}, others
    )


def test_the_original_layout(folder):
    original(folder, "model.vision_tower.vision_tower.vision_model.")
    built(config=QUICK, pretrained=str(folder))
    assert f"hidden_act: quick_gelu there ({ORIGINAL['mm_vision_tower']}), gelu in the recipe" in refusal(folder, config=TINY)


def test_the_original_layout_without_its_tower(folder):
    said = refusal(original(folder, prefix=None))
    assert said == f"{KEY}: {folder} holds no vision tower. Its config.json names {ORIGINAL['mm_vision_tower']}: state that."


def test_weights_that_are_nowhere(tmp_path):
    said = refusal("organization/name")
    assert said.startswith(f"{KEY}: organization/name is no folder here and could not be fetched")
    assert "name a folder" in said
    assert "are not a file, nor a folder or hub id" in refusal(tmp_path / "absent")


def test_a_hub_id_is_fetched_at_loading_only(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("components.hub._download", lambda hub_id: asked.append(hub_id) or folder)
    tower = OpenClipTower(config=QUICK, pretrained="organization/name")
    tower.build()
    assert asked == []
    tower.load_weights()
    assert asked == ["organization/name"]
    table = load_file(folder / "model.safetensors")["embeddings.position_embedding.weight"]
    assert torch.equal(tower.visual.positional_embedding, table)


def test_what_an_export_needs_besides_cannot_be_read(folder):
    tower = built(config=QUICK, pretrained=str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="holds no model.safetensors"):
        tower.unused_weights()


def test_a_pruned_open_clip_file_is_enough_for_features_but_not_for_an_export(tmp_path):
    tower = OpenClipTower(config=TINY)
    tower.build()
    torch.save(tower.visual.state_dict(), tmp_path / "tower.pt")
    pruned = built(config=TINY, pretrained=str(tmp_path / "tower.pt"))
    with pytest.raises(RecipeError, match=r"missing: visual.transformer.resblocks.3.ln_1.weight \(64,\)"):
        pruned.unused_weights()
