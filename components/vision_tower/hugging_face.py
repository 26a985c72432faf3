"""Vision transformers of open_clip and of transformers: the same tensors under two names, the same architecture in two configs."""

import math
from dataclasses import dataclass
from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from timm.layers import GELU, GELUTanh
from timm.models.vision_transformer import Block
from torch import nn

from components.errors import RecipeError
from components.named_tensors import Pairing, listed

KINDS = ("weight", "bias")


@dataclass(frozen=True)
class Family:
    """One of transformers' vision models, and how open_clip names its tensors.

    Args:
        model_type: Its name in a config.json.
        top: Our names and theirs of the tensors outside of the blocks.
        blocks: Our name of the list of blocks.
        qkv: Our name of query, key and value in one, in a block, before `weight` and `bias`.
        layers: Our names and theirs of a block's other layers.
        heads: What our names of pooling and projection begin with; no patch feature passes through them.
        defaults: Values that a config.json leaves out.
    """

    model_type: str
    top: dict[str, str]
    blocks: str
    qkv: str
    layers: dict[str, str]
    heads: tuple[str, ...]
    defaults: dict[str, Any]

    def pairings(self, layers: int) -> list[Pairing]:
        """Our tensors, named as in the tower's state dict, and theirs without prefix, of an encoder with a number of blocks."""
        pairs = [Pairing(f"visual.{ours}", (theirs,), ours == "trunk.pos_embed") for ours, theirs in self.top.items()]
        for number in range(layers):
            ours, theirs = f"visual.{self.blocks}.{number}", f"encoder.layers.{number}"
            for kind in KINDS:
                qkv = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
                pairs.append(Pairing(f"{ours}.{self.qkv}{kind}", qkv))
                pairs += [Pairing(f"{ours}.{one}.{kind}", (f"{theirs}.{two}.{kind}",)) for one, two in self.layers.items()]
        return pairs


def _both(names: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in KINDS}


TABLE, FINAL_NORM = "embeddings.position_embedding.weight", "post_layernorm."
_SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
CLIP = Family(
    model_type="clip_vision_model",
    top={
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": TABLE,
        **_both({"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}),  # sic
    },
    blocks="transformer.resblocks",
    qkv="attn.in_proj_",
    layers={
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
    heads=("proj",),
    defaults=_SIZES | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
)  # fmt: skip
SIGLIP = Family(
    model_type="siglip_vision_model",
    top={
        "trunk.pos_embed": TABLE,
        **_both({"trunk.patch_embed.proj": "embeddings.patch_embedding", "trunk.norm": "post_layernorm"}),
    },
    blocks="trunk.blocks",
    qkv="attn.qkv.",
    layers={
        "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    heads=("trunk.attn_pool.", "head."),
    defaults=_SIZES | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
)  # fmt: skip
FAMILIES = {family.model_type: family for family in (CLIP, SIGLIP)}


def blocks_of(visual: VisionTransformer | TimmModel) -> list[nn.Module]:
    """The transformer blocks that a vision transformer has now."""
    return list(visual.trunk.blocks if isinstance(visual, TimmModel) else visual.transformer.resblocks)


def config_of(visual: VisionTransformer | TimmModel, layers: int, projection_dim: int) -> dict[str, Any]:
    """The `vision_config` of the transformers model that computes the same patch features.

    Args:
        visual: A whole vision transformer, pooling and projection included; it may be on the meta device.
        layers: How many of its blocks the other model has.
        projection_dim: Width of CLIP's projection, which is in a config but not among the tensors of a vision model.

    Raises:
        RecipeError: Neither CLIPVisionModel nor SiglipVisionModel computes the same.
    """
    family, blocks = SIGLIP if isinstance(visual, TimmModel) else CLIP, blocks_of(visual)
    expected = {pair.ours.removeprefix("visual.") for pair in family.pairings(len(blocks))}
    found = {name for name in visual.state_dict() if not name.startswith(family.heads)}
    problems = [f"lacks {name}" for name in sorted(expected - found)] + [f"has {name}" for name in sorted(found - expected)]
    # a block of another type may have the same tensors and use them in another way
    kinds: tuple[type, ...] = (ResidualAttentionBlock, Block)
    problems += [f"has blocks of type {kind.__name__}" for kind in {type(block) for block in blocks} if kind not in kinds]
    if problems:
        raise RecipeError(
            f"The vision tower cannot be written in the Hugging Face LLaVA layout: unlike transformers' {family.model_type}, it\n  "
            + listed(problems)
        )
    first: Any = blocks[0]
    norm, act = (first.norm1, first.mlp.act) if family is SIGLIP else (first.ln_1, first.mlp.gelu)
    patch_size = visual.trunk.patch_embed.patch_size if isinstance(visual, TimmModel) else visual.patch_size
    config = {
        "model_type": family.model_type,
        "hidden_size": norm.normalized_shape[0],
        "intermediate_size": (first.mlp.fc1 if family is SIGLIP else first.mlp.c_fc).out_features,
        "num_hidden_layers": layers,
        "num_attention_heads": first.attn.num_heads,
        "num_channels": 3,
        "image_size": visual.image_size[0],
        "patch_size": patch_size[0],
        "hidden_act": _activation(act),
        "layer_norm_eps": norm.eps,
        "attention_dropout": 0.0,
    }
    # the pooling head is not written: no patch feature passes through it
    return config | ({"vision_use_head": False} if family is SIGLIP else {"projection_dim": projection_dim})


def config_problems(stated: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What a folder's `vision_config` says otherwise than ours, one line each; nothing of it need show in names or shapes.

    A CLIP model for pictures of another size is none: its position table is resized.

    Args:
        stated: The config.json's, in which transformers leaves out what is default.
        ours: As `config_of` gives it.
    """
    family = FAMILIES[ours["model_type"]]
    theirs = {**family.defaults, **stated}
    problems = []
    for name in family.defaults:
        there, here = theirs[name], ours[name]
        if name == "image_size" and family is CLIP:
            continue
        if name == "hidden_act" and family is SIGLIP and (there, here) == ("gelu_pytorch_tanh", "gelu"):
            # the same released weights: open_clip runs the first SigLIP with the exact GELU, transformers with its approximation
            continue
        if not (math.isclose(there, here) if name == "layer_norm_eps" else there == here):
            problems.append(f"{name}: {there} there, {here} in the recipe")
    return problems


def _activation(module: nn.Module) -> str:
    """The name of an activation in a config.json."""
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, GELUTanh) or (isinstance(module, nn.GELU) and module.approximate == "tanh"):
        return "gelu_pytorch_tanh"
    if isinstance(module, GELU | nn.GELU):
        return "gelu"
    raise RecipeError(f"The vision tower's activation {type(module).__name__} cannot be written in the Hugging Face LLaVA layout.")
