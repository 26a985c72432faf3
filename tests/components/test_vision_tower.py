"""The vision tower against transformers' CLIP, timm's SigLIP, and its own promises about names and normalisation."""

import open_clip
import pytest
import torch
from small_towers import TINY, built, on_meta
from transformers import CLIPVisionConfig, CLIPVisionModel

from components.errors import RecipeError
from components.vision_tower import OpenClipTower


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def open_clip_names(hf_state, layers):
    """Weights of transformers' CLIPVisionModel under open_clip's names."""
    hf_state = {name.removeprefix("vision_model."): tensor for name, tensor in hf_state.items()}
    state = {
        "class_embedding": hf_state["embeddings.class_embedding"],
        "positional_embedding": hf_state["embeddings.position_embedding.weight"],
        "conv1.weight": hf_state["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"ln_pre.{kind}"] = hf_state[f"pre_layrnorm.{kind}"]
        for layer in range(layers):
            theirs, ours = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            fused = [hf_state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{ours}.attn.in_proj_{kind}"] = torch.cat(fused)
            state[f"{ours}.attn.out_proj.{kind}"] = hf_state[f"{theirs}.self_attn.out_proj.{kind}"]
            state[f"{ours}.ln_1.{kind}"] = hf_state[f"{theirs}.layer_norm1.{kind}"]
            state[f"{ours}.ln_2.{kind}"] = hf_state[f"{theirs}.layer_norm2.{kind}"]
            state[f"{ours}.mlp.c_fc.{kind}"] = hf_state[f"{theirs}.mlp.fc1.{kind}"]
            state[f"{ours}.mlp.c_proj.{kind}"] = hf_state[f"{theirs}.mlp.fc2.{kind}"]
    return state


@pytest.mark.parametrize("feature_layer", [-2, -1, 0])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_features_equal_transformers_clip(activation, feature_layer, pixels, tmp_path):
    torch.manual_seed(0)
    hf_config = CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act=activation,
    )
    reference = CLIPVisionModel(hf_config).eval()
    with torch.no_grad():  # the default initialisation is so small that every block is nearly the identity
        for parameter in reference.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    torch.save(open_clip_names(reference.state_dict(), layers=4), tmp_path / "tower.pt")

    config = {**TINY, "mlp_ratio": 4.0, "quick_gelu": activation == "quick_gelu"}
    tower = built(config=config, pretrained=str(tmp_path / "tower.pt"), feature_layer=feature_layer)
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    with torch.no_grad():
        features = tower(pixels)
        # entry 0 is the input of the first block
        states = reference((pixels / 255 - mean) / std, output_hidden_states=True).hidden_states
    expected = states[feature_layer if feature_layer < 0 else feature_layer + 1][:, 1:]
    assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()
    other = states[-3 if feature_layer == -1 else -1][:, 1:]
    assert (features - other).abs().max() > 0.1 * expected.abs().max()


def test_siglip_features_equal_timm_without_final_norm(pixels):
    """A small SigLIP-like timm model under open_clip's adapter, against timm's own blocks run by hand."""
    torch.manual_seed(0)
    tower = built(model_name="ViT-B-16-SigLIP", feature_layer=1)
    trunk = tower.visual.trunk
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        hidden = trunk.patch_embed(images / 255 * 2 - 1).add(trunk.pos_embed)
        for block in trunk.blocks:
            hidden = block(hidden)
        torch.testing.assert_close(tower(images), hidden, rtol=1e-5, atol=1e-5)
    assert len(tower.blocks()) == 2


@pytest.mark.parametrize(
    ("model_name", "image_size", "num_patches", "feature_dim", "num_blocks", "parameters"),
    [
        ("ViT-L-14", 224, 256, 1024, 23, 290_581_504),
        ("ViT-L-14-336-quickgelu", 336, 576, 1024, 23, 290_909_184),
        ("ViT-SO400M-14-SigLIP-384", 384, 729, 1152, 26, 397_745_440),
    ],
)
def test_known_towers_on_meta(model_name, image_size, num_patches, feature_dim, num_blocks, parameters):
    tower = on_meta(model_name=model_name)
    assert (tower.image_size, tower.num_patches, tower.feature_dim) == (image_size, num_patches, feature_dim)
    features = tower(torch.empty(2, 3, image_size, image_size, dtype=torch.uint8, device="meta"))
    assert features.shape == (2, num_patches, feature_dim)
    assert all(parameter.is_meta for parameter in tower.parameters())
    assert len(tower.blocks()) == num_blocks
    assert num_parameters(tower) == parameters


def test_one_block_more_costs_one_block():
    two_less, last = (on_meta(model_name="ViT-L-14", feature_layer=layer) for layer in (-3, -1))
    assert num_parameters(last) - num_parameters(two_less) == 2 * num_parameters(last.blocks()[0])


@pytest.mark.parametrize("tower", [{"config": TINY}, {"model_name": "ViT-B-16-SigLIP", "feature_layer": 0}])
def test_every_parameter_is_used(tower):
    tower = built(**tower)
    tower(torch.zeros(1, 3, tower.image_size, tower.image_size, dtype=torch.uint8)).sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


def test_constructing_keeps_the_random_state():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    OpenClipTower(model_name="ViT-B-16-SigLIP")
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("tower", "mean"),
    [
        ({"model_name": "ViT-L-14-336-quickgelu", "pretrained": "openai"}, open_clip.OPENAI_DATASET_MEAN),
        ({"model_name": "ViT-L-14", "pretrained": "laion2b_s32b_b82k"}, (0.5, 0.5, 0.5)),
        ({"model_name": "ViT-SO400M-14-SigLIP-384"}, (0.5, 0.5, 0.5)),
        ({"model_name": "ViT-L-14", "pretrained": "my/weights.pt"}, open_clip.OPENAI_DATASET_MEAN),
        ({"config": TINY}, open_clip.OPENAI_DATASET_MEAN),
    ],
)
def test_mean_is_that_of_the_weights(tower, mean):
    assert OpenClipTower(**tower).mean == mean


def test_normalisation_equals_the_transform_of_open_clip(pixels, monkeypatch):
    tower = built(config=TINY)
    transform = open_clip.image_transform(32, is_train=False, mean=tower.mean, std=tower.std).transforms[-1]
    seen = []
    tower.visual.conv1.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    tower(pixels)
    torch.testing.assert_close(seen[0], transform(pixels / 255))
    tower.bfloat16()(pixels)
    assert torch.equal(seen[1], seen[0].bfloat16())  # rounded once, after the normalisation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"model_name": "ViT-L-14", "config": TINY}, "exactly one"),
        ({"model_name": "ViT-L14"}, "Close matches: ViT-L-14"),
        ({"model_name": "ViT-L-14", "pretrained": "laion2b_s32b"}, "laion2b_s32b_b82k"),
        ({"model_name": "ViT-L-14-336", "pretrained": "openai"}, "State model_name: ViT-L-14-336-quickgelu"),
        ({"model_name": "ViT-L-14-quickgelu", "pretrained": "laion2b_s32b_b82k"}, "State model_name: ViT-L-14."),
        ({"model_name": "RN50"}, "no plain vision transformer"),
        ({"model_name": "EVA02-L-14-336"}, "no plain vision transformer"),
        ({"config": TINY, "pretrained": "openai"}, "has no tags"),
        ({"config": {**TINY, "heads": 4}}, "unknown key 'heads'. Close matches: head_width"),
        ({"config": {"image_size": 32}}, "lacks patch_size, width, layers, head_width"),
        ({"config": {**TINY, "head_width": 24}}, "width 64 is no multiple of its head_width 24"),
        ({"config": {**TINY, "patch_size": 5}}, "image_size 32 is no multiple of its patch_size 5"),
        ({"config": TINY, "feature_layer": 4}, "Choose -4 to 3"),
        ({"config": TINY, "feature_layer": -5}, "Choose -4 to 3"),
    ],
)
def test_mistakes_are_named_before_anything_is_built(arguments, message):
    with pytest.raises(RecipeError) as error:
        OpenClipTower(**arguments)
    assert message in str(error.value)
