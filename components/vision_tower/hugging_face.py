"""Vision transformers of open_clip and of transformers: the same tensors under two names, the same architecture in two configs."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from components.errors import RecipeError
from components.named_tensors import NamedTensors, Pairing, Renamed, TensorInfo, differences, listed, weights_in

QKV = ("q_proj", "k_proj", "v_proj")
BOTH = ("weight", "bias")
CLIP_BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
SIGLIP_BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
CLIP_TOP = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    **{
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"))
        for kind in BOTH
    },
}
SIGLIP_TOP = {
    "trunk.pos_embed": "embeddings.position_embedding.weight",
    **{f"trunk.patch_embed.proj.{kind}": f"embeddings.patch_embedding.{kind}" for kind in BOTH},
    **{f"trunk.norm.{kind}": f"post_layernorm.{kind}" for kind in BOTH},
}

_PREFIX = re.compile(r"(?:model\.)?(?:vision_tower\.)*(?:vision_model\.)?")
_NO_FEATURE = re.compile(r"(?:head|visual_projection|text_model|text_projection|logit_scale|logit_bias)(?:\.|$)|.*position_ids$")
"""Pooling head, text tower and computed tables."""


def pairings(visual: VisionTransformer | TimmModel) -> list[Pairing]:
    """Tensors of a vision transformer with the layers it has now, and transformers' names of them."""
    timm = isinstance(visual, TimmModel)
    top, block, joined, blocks = (
        (SIGLIP_TOP, SIGLIP_BLOCK, "attn.qkv.{}", "trunk.blocks")
        if timm
        else (CLIP_TOP, CLIP_BLOCK, "attn.in_proj_{}", "transformer.resblocks")
    )
    known = {name: Pairing(f"visual.{name}", (theirs,), leading_one=name == "trunk.pos_embed") for name, theirs in top.items()}
    for layer in range(len(visual.trunk.blocks if isinstance(visual, TimmModel) else visual.transformer.resblocks)):
        ours, theirs = f"{blocks}.{layer}", f"encoder.layers.{layer}"
        for kind in BOTH:
            qkv = f"{ours}.{joined.format(kind)}"
            known[qkv] = Pairing(f"visual.{qkv}", tuple(f"{theirs}.self_attn.{part}.{kind}" for part in QKV))
            known |= {
                f"{ours}.{name}.{kind}": Pairing(f"visual.{ours}.{name}.{kind}", (f"{theirs}.{other}.{kind}",))
                for name, other in block.items()
            }
    return [known[name] for name in visual.state_dict() if name in known]


def config_of(visual: VisionTransformer | TimmModel, layers: int, projection_dim: int) -> dict[str, Any]:
    """The `vision_config` of the transformers model that computes the same, with a number of layers of its own.

    Raises:
        RecipeError: transformers has no such model.
    """
    named = {pair.ours.removeprefix("visual.") for pair in pairings(visual)}
    strange = [
        name
        for name in visual.state_dict()
        if name not in named and not name.startswith(("proj", "trunk.attn_pool.", "head.", "trunk.fc_norm"))
    ]
    timm = isinstance(visual, TimmModel)
    block = visual.trunk.blocks[0] if isinstance(visual, TimmModel) else visual.transformer.resblocks[0]
    norm = block.norm1 if timm else block.ln_1
    act = block.mlp.act if timm else block.mlp.gelu
    if strange or not (timm or isinstance(visual.ln_pre, nn.LayerNorm)):
        raise RecipeError(
            f"The vision tower has tensors that neither CLIP nor SigLIP of transformers has ({', '.join(strange[:3])}): it has no "
            "place in the Hugging Face LLaVA layout."
        )
    attention = block.attn
    config = {
        "model_type": "siglip_vision_model" if timm else "clip_vision_model",
        "hidden_size": norm.normalized_shape[0],
        "intermediate_size": (block.mlp.fc1 if timm else block.mlp.c_fc).out_features,
        "num_hidden_layers": layers,
        "num_attention_heads": attention.num_heads,
        "num_channels": 3,
        "image_size": visual.image_size[0],
        "patch_size": visual.trunk.patch_embed.patch_size[0] if isinstance(visual, TimmModel) else visual.patch_size[0],
        "hidden_act": activation(act),
        "layer_norm_eps": norm.eps,
        "attention_dropout": 0.0,
    }
    return config | ({"vision_use_head": False} if timm else {"projection_dim": projection_dim})


def activation(module: nn.Module) -> str:
    """Transformers' name of an activation."""
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    tanh = getattr(module, "approximate", "none") == "tanh" or type(module).__name__ == "GELUTanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"


def vision_tensors(folder: Path, key: str) -> NamedTensors:
    """The vision tensors of a CLIP, SigLIP or LLaVA folder, under transformers' names without any prefix.

    Raises:
        RecipeError: The folder holds no weights, or they cannot be read.
    """
    found = weights_in(folder)
    if found is None:
        raise RecipeError(f"{key}: {folder} holds no weights (*.safetensors or pytorch_model*.bin).")
    apart = any("vision_model." in name or "vision_tower." in name for name in found.infos)

    def rename(name: str) -> str | None:
        if apart and "vision_model." not in name and "vision_tower." not in name:
            return None
        short = _PREFIX.sub("", name, count=1)
        return None if _NO_FEATURE.match(short) else short

    return Renamed(found, rename)


def demand_same_config(folder: Path, ours: dict[str, Any], mean: Iterable[float], std: Iterable[float], key: str) -> None:
    """A folder's vision config and image processor state what the tower is; what they leave out shows in the shapes.

    Raises:
        RecipeError: With what differs.
    """
    config = _json(folder / "config.json")
    stated = config.get("vision_config", config)
    kind = ours["model_type"]
    clip = kind == "clip_vision_model"
    theirs = {"hidden_act": "quick_gelu" if clip else "gelu_pytorch_tanh", **stated}
    problems = []
    if theirs.get("model_type", kind) not in (kind, kind.removesuffix("_vision_model")):
        problems.append(f"model_type: {theirs['model_type']} there, {kind} here")
    same = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
    ]
    for name in same if clip else [*same, "image_size"]:
        one, other = theirs.get(name, ours[name]), ours[name]
        # SigLIP's own code approximates GELU and timm does not, with the same released weights
        if one != other and not (name == "hidden_act" and not clip and one.startswith("gelu") and other.startswith("gelu")):
            problems.append(f"{name}: {one} there, {other} in the recipe")
    for name in ("preprocessor_config.json", "processor_config.json"):
        processor = _json(folder / name)
        processor = processor.get("image_processor", processor)
        for field, values in (("image_mean", tuple(mean)), ("image_std", tuple(std))):
            there = processor.get(field)
            if there and any(abs(a - b) > 1e-6 for a, b in zip(there, values, strict=True)):
                problems.append(f"{field}: {tuple(there)} there, {values} in the recipe")
    if problems:
        raise RecipeError(f"{key}: {folder} is not the tower of the recipe:\n  {listed(problems)}\nState its model_name or config.")


def demand_same_tensors(
    found: NamedTensors, needed: dict[str, tuple[int, ...]], known: Iterable[str], resizable: str | None, key: str
) -> None:
    """Every tensor that the features need is there with its shape, and none that transformers' model does not have.

    Raises:
        RecipeError: With what differs.
    """
    shapes = {name: info.shape for name, info in found.infos.items() if name in needed or name not in set(known)}
    if resizable in shapes:
        shapes[str(resizable)] = needed[str(resizable)]
    if problems := differences(needed, shapes):
        raise RecipeError(f"{key}: the weights in {found.where} do not fit the vision tower:\n  {listed(problems)}")


class Split(NamedTensors):
    """Our tensors under transformers' names.

    Args:
        source: Tensors under our names.
        pairs: Which of transformers' they hold.
    """

    def __init__(self, source: NamedTensors, pairs: Iterable[Pairing]) -> None:
        self.where = source.where
        self._source = source
        self._pairs = {name: pair for pair in pairs for name in pair.theirs}
        self.infos = {}
        for name, pair in self._pairs.items():
            info = source.infos[pair.ours]
            shape = info.shape[1:] if pair.leading_one else info.shape
            parts = len(pair.theirs)
            self.infos[name] = TensorInfo((shape[0] // parts, *shape[1:]) if parts > 1 else shape, info.dtype)

    def read(self, name: str) -> Tensor:
        """The tensor."""
        pair = self._pairs[name]
        return pair.split(self._source.read(pair.ours))[name]


def shapes_of(pairs: Iterable[Pairing], state: dict[str, Tensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Transformers' names of our tensors, each with its shape."""
    for pair in pairs:
        shape = tuple(state[pair.ours.removeprefix("visual.")].shape)[1 if pair.leading_one else 0 :]
        parts = len(pair.theirs)
        yield from ((name, (shape[0] // parts, *shape[1:]) if parts > 1 else shape) for name in pair.theirs)


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise RecipeError(f"{file} is not JSON: {error}. Fetch it again.") from error
