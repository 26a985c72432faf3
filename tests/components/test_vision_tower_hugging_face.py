"""The vision tower between open_clip and transformers: the same features, and every tensor back where it came from."""

import pytest
import torch
from safetensors.torch import load_file
from small_towers import (
    MODELS,
    TINY,
    add_tiny_siglip,
    bare,
    built,
    hugging_face_model,
    layer_features,
    on_meta,
    reconfigured,
    rewritten,
    saved,
    whole_clip,
)
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipConfig, SiglipModel

from components.errors import RecipeError
from components.vision_tower import OpenClipTower, VisionTower

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def written_back(tower):
    """All tensors of an export's vision part under transformers' names: those of the features, and the others."""
    state, tensors = tower.state_dict(), {}
    for pair in tower.huggingface_names():
        tensors |= pair.split(state[pair.ours])
    unused = tower.unused_weights()
    assert not tensors.keys() & unused.infos.keys()
    return tensors | {name: unused.read(name) for name in unused.infos}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def relative_error(features, expected):
    return ((features - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_clip_folder_gives_the_features_of_transformers(activation, pixels, tmp_path):
    reference = hugging_face_model(hidden_act=activation)
    folder = saved(reference, tmp_path / "clip")
    tower = built(config={**TINY, "quick_gelu": activation == "quick_gelu"}, pretrained=str(folder))
    expected = layer_features(reference, tower, pixels)
    with torch.no_grad():
        assert relative_error(tower(pixels), expected) <= 1e-5
    assert relative_error(layer_features(reference, tower, pixels, -3), expected) > 0.1


@pytest.mark.parametrize(("act_layer", "activation"), [(None, "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_a_siglip_folder_gives_the_features_of_transformers(act_layer, activation, pixels, tmp_path, monkeypatch):
    reference = hugging_face_model("siglip_vision_model", hidden_act=activation)
    folder = saved(reference, tmp_path / "siglip")
    tower = built(model_name=add_tiny_siglip(monkeypatch, act_layer), pretrained=str(folder))
    with torch.no_grad():
        assert relative_error(tower(pixels), layer_features(reference, tower, pixels)) <= 1e-5


def test_what_transformers_calls_tanh_runs_with_the_exact_gelu_of_the_first_siglip(pixels, tmp_path, monkeypatch):
    reference = hugging_face_model("siglip_vision_model", spread=0.1)
    assert reference.config.hidden_act == "gelu_pytorch_tanh"
    tower = built(model_name=add_tiny_siglip(monkeypatch), pretrained=str(saved(reference, tmp_path / "siglip")))
    assert tower.huggingface_config(4)["hidden_act"] == "gelu"
    with torch.no_grad():
        assert 1e-6 < relative_error(tower(pixels), layer_features(reference, tower, pixels)) < 2e-3
        for layer in reference.modules():
            if hasattr(layer, "activation_fn"):
                layer.activation_fn = nn.GELU()
        assert relative_error(tower(pixels), layer_features(reference, tower, pixels)) <= 1e-5


@pytest.mark.parametrize("feature_layer", [-1, -2, 0])
@pytest.mark.parametrize("kind", list(MODELS))
def test_every_tensor_of_a_folder_returns(kind, feature_layer, tmp_path, monkeypatch):
    is_clip = kind == "clip_vision_model"
    reference = hugging_face_model(kind, hidden_act="gelu")
    folder = saved(reference, tmp_path / "folder")
    architecture = {"config": TINY} if is_clip else {"model_name": add_tiny_siglip(monkeypatch)}
    tower = built(**architecture, pretrained=str(folder), feature_layer=feature_layer)
    stored = {bare(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    assert same(written_back(tower), {name: tensor for name, tensor in stored.items() if not name.startswith("head.")})
    assert tower.num_layers == 4 and tower.has_class_token == is_clip


@pytest.mark.parametrize("kind", list(MODELS))
def test_transformers_computes_the_features_of_an_open_clip_file(kind, pixels, tmp_path, monkeypatch):
    """The other way: its config and tensors are enough for transformers' own class."""
    architecture = {"config": TINY} if kind == "clip_vision_model" else {"model_name": add_tiny_siglip(monkeypatch)}
    state = OpenClipTower(**architecture)._whole_tower().state_dict()
    torch.manual_seed(2)
    state = {f"visual.{name}": 0.3 * torch.randn_like(tensor) for name, tensor in state.items()}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "checkpoint.pt")
    tower = built(**architecture, pretrained=str(tmp_path / "checkpoint.pt"))
    config, model = MODELS[kind]
    reference = model(config(**tower.huggingface_config(tower.num_layers))).eval()
    tensors = written_back(tower)
    reference.load_state_dict({name: tensors[bare(name)] for name in reference.state_dict()})
    assert len(tensors) == len(reference.state_dict())
    with torch.no_grad():
        assert relative_error(tower(pixels), layer_features(reference, tower, pixels)) <= 1e-5


def whole_model_folder(form, tower, folder):
    """The tower inside a larger model of transformers, written by transformers."""
    if form == "siglip":
        model = SiglipModel(
            SiglipConfig(vision_config=tower.config.to_dict(), text_config=TEXT | {"bos_token_id": 0, "eos_token_id": 1})
        )
        model.vision_model.load_state_dict(tower.state_dict())
    elif form == "clip":
        text = TEXT | {"bos_token_id": 0, "eos_token_id": 1}
        model = CLIPModel(CLIPConfig(vision_config=tower.config.to_dict(), text_config=text, projection_dim=8))
        model.vision_model.load_state_dict(tower.state_dict())
    else:
        text = LlamaConfig(**TEXT, bos_token_id=0, eos_token_id=1)
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower.config.to_dict(), text_config=text.to_dict()))
        model.model.vision_tower.load_state_dict(tower.state_dict())
    model.save_pretrained(folder)
    return folder


def prefixed(prefix):
    return lambda state: {prefix + bare(name): tensor for name, tensor in state.items()}


LLAVA_OTHERS = {"language_model.lm_head.weight": torch.zeros(3, 2), "multi_modal_projector.linear_1.bias": torch.zeros(2)}
ORIGINAL_OTHERS = {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 2), "model.mm_projector.0.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("", {"embeddings.position_ids": torch.arange(17)}),
        ("vision_model.", {"text_model.embeddings.position_ids": torch.arange(8), "logit_scale": torch.ones(1)}),
        ("vision_model.", {"vision_model.embeddings.position_ids": torch.arange(17), "visual_projection.weight": torch.ones(1)}),
        ("vision_tower.vision_model.", LLAVA_OTHERS),
        ("vision_tower.", LLAVA_OTHERS),
        ("model.vision_tower.vision_model.", {"model.language_model.norm.weight": torch.zeros(2)}),
        ("model.vision_tower.", {"model.language_model.norm.weight": torch.zeros(2)}),
        ("model.vision_tower.vision_tower.vision_model.", ORIGINAL_OTHERS),
    ],
)
def test_every_prefix_is_known(prefix, others, tmp_path):
    reference = hugging_face_model(hidden_act="gelu")
    folder = rewritten(saved(reference, tmp_path / "folder"), prefixed(prefix), others)
    tower = built(config=TINY, pretrained=str(folder))
    assert same(written_back(tower), {bare(name): tensor for name, tensor in reference.state_dict().items()})


@pytest.mark.parametrize("form", ["clip", "siglip", "llava"])
def test_whole_models_of_transformers(form, tmp_path, monkeypatch):
    kind = "siglip_vision_model" if form == "siglip" else "clip_vision_model"
    reference = hugging_face_model(kind, hidden_act="gelu")
    folder = whole_model_folder(form, reference, tmp_path / form)
    architecture = {"model_name": add_tiny_siglip(monkeypatch)} if form == "siglip" else {"config": TINY}
    tower = built(**architecture, pretrained=str(folder))
    expected = {bare(name): tensor for name, tensor in reference.state_dict().items()}
    assert same(written_back(tower), {name: tensor for name, tensor in expected.items() if not name.startswith("head.")})


def test_a_folder_of_pytorch_files_in_half_precision(tmp_path):
    reference = hugging_face_model(hidden_act="gelu").half()
    folder = saved(reference, tmp_path / "folder")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    tower = built(config=TINY, pretrained=str(folder))
    assert tower.visual.conv1.weight.dtype == torch.float32
    expected = {bare(name): tensor for name, tensor in reference.state_dict().items()}
    assert same({name: tensor.half() for name, tensor in written_back(tower).items()}, expected)


def test_a_folder_for_larger_pictures_is_resized_as_open_clip_does(tmp_path):
    folder = saved(hugging_face_model(hidden_act="gelu", image_size=64), tmp_path / "folder")
    table = load_file(folder / "model.safetensors")["embeddings.position_embedding.weight"]
    clip = whole_clip(image_size=64)
    with torch.no_grad():
        clip.visual.positional_embedding.copy_(table)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    ours, of_open_clip = (built(config=TINY, pretrained=str(tmp_path / name)) for name in ("folder", "clip.pt"))
    assert ours.visual.positional_embedding.shape == (17, 64)
    assert torch.equal(ours.visual.positional_embedding, of_open_clip.visual.positional_embedding)


def test_what_a_config_leaves_out_is_the_default_of_transformers(tmp_path):
    folder = reconfigured(saved(hugging_face_model(), tmp_path / "folder"), hidden_act=None, layer_norm_eps=None)
    built(config={**TINY, "quick_gelu": True}, pretrained=str(folder))
    with pytest.raises(RecipeError, match="hidden_act: quick_gelu there, gelu in the recipe"):
        built(config=TINY, pretrained=str(folder))


@pytest.mark.parametrize(
    ("model_name", "expected"),
    [
        (
            "ViT-L-14-336-quickgelu",
            {
                "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                "num_attention_heads": 16, "num_channels": 3, "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "projection_dim": 768,
            },
        ),
        (
            "ViT-SO400M-14-SigLIP-384",
            {
                "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 24,
                "num_attention_heads": 16, "num_channels": 3, "image_size": 384, "patch_size": 14, "hidden_act": "gelu",
                "layer_norm_eps": 1e-6, "attention_dropout": 0.0, "vision_use_head": False,
            },
        ),
    ],
)  # fmt: skip
def test_the_configs_of_known_towers(model_name, expected):
    assert OpenClipTower(model_name=model_name).huggingface_config(24) == expected


def test_names_of_a_tower_on_meta_are_those_of_its_state():
    for model_name, layers in (("ViT-L-14-336-quickgelu", 24), ("ViT-SO400M-14-SigLIP-384", 27)):
        tower = on_meta(model_name=model_name)
        assert {pair.ours for pair in tower.huggingface_names()} == set(tower.state_dict())
        assert tower.num_layers == layers and tower.unused_weights() is None


@pytest.mark.parametrize(
    ("model_name", "message"),
    [
        ("ViT-L-14-CLIPA", "lacks ln_pre.bias"),
        ("ViT-M-16-alt", "has transformer.resblocks.0.ls_1.gamma"),
        ("coca_ViT-B-32", "has attn_pool.attn.in_proj_bias"),
        ("vit_medium_patch16_gap_256", "lacks trunk.blocks.0.attn.qkv.bias"),
    ],
)
def test_towers_that_transformers_does_not_have(model_name, message):
    tower = OpenClipTower(model_name=model_name)
    for ask in (tower.huggingface_names, tower.unused_weights, lambda: tower.huggingface_config(2)):
        with pytest.raises(RecipeError, match="cannot be written in the Hugging Face LLaVA layout") as error:
            ask()
        assert message in str(error.value)


def test_other_kinds_of_towers_have_no_place_unless_they_say_so():
    class Other(VisionTower):
        build = load_weights = forward = blocks = None

    tower = Other()
    for ask in (tower.huggingface_names, tower.unused_weights, lambda: tower.huggingface_config(2)):
        with pytest.raises(RecipeError, match="Other cannot be written in the Hugging Face LLaVA layout"):
            ask()


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["ViT-L-14", "ViT-L-14-336-quickgelu", "ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP-384"])
def test_full_size(model_name, tmp_path):
    tower = OpenClipTower(model_name=model_name, pretrained=str(tmp_path / "folder"))
    stated = tower.huggingface_config(tower.num_layers)
    config, model = MODELS[stated["model_type"]]
    reference = model(config(**stated)).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # norms near one and matrices of their input's size: every block matters in every layer
        for parameter in reference.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1 + noise / 10)
    saved(reference, tmp_path / "folder")
    tower.build()
    tower.load_weights()
    pixels = torch.randint(0, 256, (1, 3, tower.image_size, tower.image_size), dtype=torch.uint8)
    with torch.no_grad():
        features = tower.eval()(pixels)
    expected = layer_features(reference, tower, pixels)
    error = relative_error(features, expected)
    print(f"{model_name}: relative error {error:.1e}")
    assert error <= 1e-5
    assert relative_error(layer_features(reference, tower, pixels, -3), expected) > 1e-2
    assert same(written_back(tower), {bare(name): tensor for name, tensor in reference.state_dict().items()})
