"""Small vision towers for tests, and transformers' models of their size in folders of all layouts."""

import json

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from components.vision_tower import OpenClipTower

TINY = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 16}
TINY_HF = {
    "image_size": 32, "patch_size": 8, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4,
}  # fmt: skip
MODELS = {
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
}


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


def whole_clip(**changes):
    """A whole open_clip model, text tower included, with the vision tower of TINY."""
    torch.manual_seed(1)
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return CLIP(embed_dim=24, vision_cfg={**TINY, **changes}, text_cfg=text)


def add_tiny_siglip(monkeypatch, act_layer=None):
    """A model name of open_clip for timm's SigLIP class at the size of TINY; open_clip itself knows large ones only."""

    def create(name, num_classes, global_pool, pretrained):
        return VisionTransformer(
            img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, class_token=False, num_classes=num_classes,
            global_pool=global_pool, act_layer=act_layer,
        )  # fmt: skip

    monkeypatch.setattr("open_clip.timm_model.timm.create_model", create)
    vision = {"image_size": 32, "timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-SigLIP", {"embed_dim": 64, "vision_cfg": vision, "text_cfg": {}})
    return "tiny-SigLIP"


def hugging_face_model(kind="clip_vision_model", spread=0.3, **changes):
    """A model of transformers; its own initialisation is so small that every block is nearly the identity."""
    config, model = MODELS[kind]
    torch.manual_seed(0)
    reference = model(config(**{**TINY_HF, **changes})).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(spread * torch.randn_like(parameter))
    return reference


def layer_features(reference, tower, pixels, layer=-2):
    """Patch features of transformers' model, for pictures that are normalised as the tower does."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    with torch.no_grad():
        states = reference((pixels / 255 - mean) / std, output_hidden_states=True).hidden_states
    return states[layer][:, 1:] if tower.has_class_token else states[layer]


def bare(name):
    return name.removeprefix("vision_model.")


def saved(reference, folder):
    """The folder that transformers writes; its names have no prefix."""
    reference.save_pretrained(folder)
    return folder


def rewritten(folder, change, others=None):
    """Other names, or other tensors, in the model.safetensors of a folder."""
    state = load_file(folder / "model.safetensors")
    save_file({**change(state), **(others or {})}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reconfigured(folder, **changes):
    """Other values in the config.json of a folder; None takes one away."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder
