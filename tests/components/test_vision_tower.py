"""The vision tower against transformers' CLIP, timm's SigLIP, and its own promises about weights and errors."""

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import CLIPVisionConfig, CLIPVisionModel

from components.errors import RecipeError
from components.vision_tower import OpenClipTower

TINY = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 16}


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def built(**arguments):
    tower = OpenClipTower(**arguments)
    tower.build()
    tower.load_weights()
    return tower.eval()


def on_meta(**arguments):
    tower = OpenClipTower(**arguments)
    with torch.device("meta"):
        tower.build()
    return tower


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def whole_clip(**changes):
    """A whole open_clip model, text tower included, with the vision tower of TINY."""
    torch.manual_seed(1)
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return CLIP(embed_dim=24, vision_cfg={**TINY, **changes}, text_cfg=text)


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


@pytest.mark.parametrize("form", ["pt", "safetensors", "training checkpoint", "half precision", "tower only"])
def test_weights_from_a_file(form, pixels, tmp_path):
    clip = whole_clip().eval()
    state = clip.state_dict()
    path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "training checkpoint":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    elif form == "tower only":
        torch.save(clip.visual.state_dict(), path)
    elif form == "half precision":
        clip = clip.half().float()
        torch.save({name: tensor.half() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    tower = built(config=TINY, pretrained=str(path))
    assert all(parameter.dtype == torch.float32 for parameter in tower.parameters())
    normalised = (pixels / 255 - torch.tensor(tower.mean)[:, None, None]) / torch.tensor(tower.std)[:, None, None]
    with torch.no_grad():
        expected = clip.visual.forward_intermediates(normalised, indices=[2], output_fmt="NLC")["image_intermediates"][0]
        torch.testing.assert_close(tower(pixels), expected)


def test_weights_into_sharded_layers(tmp_path):
    """After a meta build: shard, allocate, load."""
    clip = whole_clip()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    tower = on_meta(config=TINY, pretrained=str(tmp_path / "clip.pt"))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*tower.blocks(), tower):
            fully_shard(module, mesh=mesh)
        tower.to_empty(device="cpu")
        tower.load_weights()
        loaded = {name: parameter.full_tensor() for name, parameter in tower.named_parameters()}
    finally:
        distributed.destroy_process_group()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, clip.state_dict()[name]), name


def test_position_table_of_another_picture_size_is_resized(tmp_path):
    torch.save(whole_clip(image_size=64).state_dict(), tmp_path / "large.pt")
    tower = built(config=TINY, pretrained=str(tmp_path / "large.pt"))
    table = whole_clip(image_size=64).visual.positional_embedding
    grid = table[1:].T.reshape(1, 64, 8, 8)
    expected = nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True).flatten(2)[0].T
    torch.testing.assert_close(tower.visual.positional_embedding, torch.cat([table[:1], expected]))


def drop_a_block(state):
    return {name: tensor for name, tensor in state.items() if ".resblocks.1." not in name}


def add_a_block(state):
    return state | {name.replace("resblocks.0", "resblocks.4"): tensor for name, tensor in state.items()}


def widen(state):
    return state | {"visual.ln_pre.bias": torch.zeros(65)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_a_block, "missing transformer.resblocks.1.ln_1.weight (64,)"),
        (add_a_block, "unknown transformer.resblocks.4.ln_1.weight (64,)"),
        (widen, "ln_pre.bias is (65,), should be (64,)"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(spoil, message, tmp_path):
    torch.save(spoil(whole_clip().state_dict()), tmp_path / "clip.pt")
    tower = OpenClipTower(config=TINY, pretrained=str(tmp_path / "clip.pt"))
    tower.build()
    before = {name: parameter.clone() for name, parameter in tower.named_parameters()}
    with pytest.raises(RecipeError) as error:
        tower.load_weights()
    assert message in str(error.value)
    assert all(torch.equal(before[name], parameter) for name, parameter in tower.named_parameters())


def test_weights_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    for name, message in (("broken.pt", "could not be read"), ("absent.pt", "are not a file")):
        tower = OpenClipTower(config=TINY, pretrained=str(tmp_path / name))
        tower.build()
        with pytest.raises(RecipeError, match=message):
            tower.load_weights()


def test_weights_of_a_tag_come_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "components.vision_tower.open_clip_tower.download_pretrained", lambda tag: str(tmp_path / tag["hf_hub"].strip("/"))
    )
    tower = OpenClipTower(model_name="ViT-B-32-quickgelu", pretrained="openai", feature_layer=0)
    tower.build()
    state = {name: torch.randn_like(tensor) for name, tensor in tower.visual.state_dict().items()}
    (tmp_path / "timm").mkdir()
    torch.save({f"visual.{name}": tensor for name, tensor in state.items()}, tmp_path / "timm/vit_base_patch32_clip_224.openai")
    tower.load_weights()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tower.visual.state_dict().items())


def test_a_tag_that_cannot_be_fetched(monkeypatch):
    def unreachable(tag):
        raise FileNotFoundError("no network")

    monkeypatch.setattr("components.vision_tower.open_clip_tower.download_pretrained", unreachable)
    tower = on_meta(model_name="ViT-B-32-quickgelu", pretrained="openai")
    with pytest.raises(RecipeError, match=r"'openai' could not be fetched: no network"):
        tower.load_weights()


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
