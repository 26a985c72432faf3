"""Released LLaVA weights in, a built model filled with them out; what does not fit is told before anything is read."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.decoder import without_adapters
from components.decoder.architecture import config_differences
from components.errors import RecipeError
from components.huggingface.layout import DECODER, PROJECTOR, TOWER, LlavaFolder, open_llava, pairings, preprocessing
from components.named_tensors import NamedTensors, Paired, differences, fill, listed
from components.sharding import give_memory

PARTS = {"vision_tower": TOWER, "projector": PROJECTOR, "decoder": DECODER}


def load_llava(model: Any, folder: Path, key: str = "model.initial_weights") -> set[str]:
    """Copy the weights of a LLaVA folder into a built model.

    A tower or a decoder that the folder leaves out, as the original releases do, is read from the part's own weights.

    Args:
        model: A VisionLanguageModel, built and in memory, perhaps sharded. Its adapters stay as they are.
        folder: A folder in Hugging Face's or in the original layout, or one with a lone mm_projector.bin.
        key: The option that named it, for the error messages.

    Returns:
        The names of the parts that the folder held.

    Raises:
        RecipeError: The folder holds no projector or another model, with the list of what differs.
    """
    llava = open_llava(folder, key)
    if not llava.holds(PROJECTOR):
        raise RecipeError(
            f"{key}: {folder} holds no projector (multi_modal_projector.* or mm_projector.*): it would start from random weights. "
            "Name a complete LLaVA model; a lone decoder is model.decoder.init_args.weights."
        )
    held = {part for part, prefix in PARTS.items() if llava.holds(prefix)}
    if problems := _config_problems(model, llava, held):
        rows = any(problem.startswith("vocab_size") for problem in problems)
        tokenizer = ", and its tokenizer as model.decoder.init_args.tokenizer" if rows else ""
        remedy = f"State its values in the recipe's parts{tokenizer}."
        raise RecipeError(f"{key}: {folder} is not the model of the recipe:\n  {listed(problems)}\n{remedy}")
    pairs = [p for p in pairings(model) if p.ours.split(".")[0] in held]
    check_names(model, llava.tensors, pairs, _not_needed(llava), key)
    fill(without_adapters(model.state_dict()), Paired(llava.tensors, pairs))
    for name in sorted({"vision_tower", "decoder"} - held):
        part = getattr(model, name)
        argument = "pretrained" if name == "vision_tower" else "weights"
        if getattr(part, argument, None) is None:
            raise RecipeError(
                f"{key}: {folder} holds no {name.replace('_', ' ')}, and the recipe names no weights for it. "
                f"State model.{name}.init_args.{argument}."
            )
        part.load_weights()
    return held


def check_names(model: Any, tensors: NamedTensors, pairs: Iterable[Any], not_needed: Iterable[str], key: str) -> None:
    """Every tensor that the model needs is there with its shape, and none is left over.

    Raises:
        RecipeError: With the list of what is missing, unexpected or mismatched.
    """
    state = without_adapters(model.state_dict())
    expected: dict[str, tuple[int, ...]] = {}
    for pair in pairs:
        shape = tuple(state[pair.ours].shape)[1 if pair.leading_one else 0 :]
        part = (shape[0] // len(pair.theirs), *shape[1:]) if len(pair.theirs) > 1 else shape
        expected |= dict.fromkeys(pair.theirs, part)
    allowed = set(not_needed)
    found = {name: info.shape for name, info in tensors.infos.items() if name not in allowed}
    if problems := differences(expected, found):
        raise RecipeError(f"{key}: the weights in {tensors.where} do not fit the model:\n  {listed(problems)}")


def allocate(model: Any, dtype: torch.dtype) -> None:
    """Give an unbuilt model its layers in memory, in one number format, with undefined weights that the caller must fill."""
    with torch.device("meta"):
        model.build()
    for parameter in model.parameters():  # not .to(): rotary tables stay in float32
        parameter.data = parameter.data.to(dtype)
    give_memory(model, torch.device("cpu"))
    model.decoder.reset_buffers()


def _not_needed(llava: LlavaFolder) -> list[str]:
    """Tensors of the released tower that the patch features do not pass through."""
    block = llava.feature_block
    names = [name for name in llava.tensors.infos if name.startswith(TOWER)]
    layers = {int(found[1]) for name in names if (found := re.match(rf"{re.escape(TOWER)}encoder\.layers\.(\d+)\.", name))}
    kept = max(layers, default=-1) + 1 + (block + 1 if block is not None else 0)
    unused = re.compile(rf"{re.escape(TOWER)}(?:post_layernorm\.|head\.|encoder\.layers\.(\d+)\.)")
    return [name for name in names if (found := unused.match(name)) and (found[1] is None or int(found[1]) >= kept)]


def _config_problems(model: Any, llava: LlavaFolder, held: set[str]) -> list[str]:
    """What the config says otherwise than the recipe: nothing of this shows in names or shapes."""
    if llava.layout == "projector":
        return []
    config, tower = llava.config, model.vision_tower
    problems: list[str] = []

    def compare(what: str, theirs: object, ours: object) -> None:
        if theirs != ours:
            problems.append(f"{what}: {theirs} there, {ours} in the recipe")

    stated = preprocessing(llava.folder)
    for name, ours in (("image_mean", tower.mean), ("image_std", tower.std)):
        if name in stated and not np.allclose(stated[name], ours, atol=1e-6):
            compare(name, tuple(stated[name]), ours)
    if llava.layout == "hugging_face":
        vision = config["vision_config"]
        stated_here = tower.huggingface_config(vision["num_hidden_layers"])
        for name in ("model_type", "image_size", "patch_size", "hidden_size", "intermediate_size", "num_attention_heads"):
            compare(f"vision_config.{name}", vision.get(name), stated_here.get(name))
        for name in ("hidden_act", "layer_norm_eps"):
            compare(f"vision_config.{name}", vision.get(name), stated_here.get(name))
        compare("projector_hidden_act", config.get("projector_hidden_act", "gelu"), "gelu")
        strategy = "default" if tower.has_class_token else "full"
        compare("vision_feature_select_strategy", config.get("vision_feature_select_strategy", "default"), strategy)
        layers = vision["num_hidden_layers"]
    else:
        compare("mm_hidden_size", config.get("mm_hidden_size"), tower.feature_dim)
        compare("mm_projector_type", config.get("mm_projector_type"), f"mlp{getattr(model.projector, 'depth', '?')}x_gelu")
        compare("mm_vision_select_feature", config.get("mm_vision_select_feature", "patch"), "patch")
        compare("mm_use_im_start_end", bool(config.get("mm_use_im_start_end")), False)
        layers = tower.num_layers
    if llava.feature_block is None:
        layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer"))
        problems.append(f"vision_feature_layer: {layer} there, one layer counted from the end in the recipe")
    else:
        used = layers + llava.feature_block
        compare("block of the vision tower that is used", used, tower.feature_layer % tower.num_layers)
    if "decoder" in held and llava.text_config is not None:
        problems += config_differences(model.decoder.config, llava.text_config, "there")
    return problems
