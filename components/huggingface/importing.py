"""Import: a released LLaVA model in, a run that can be asked, validated, exported and started from out."""

import re
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml

from components.causality import prove_causal
from components.checkpoint_files import INITIAL
from components.decoder import HuggingFaceDecoder
from components.decoder.architecture import NOT_ARCHITECTURE
from components.errors import RecipeError
from components.hub import fetch, looks_like_hub_id
from components.huggingface.initial import allocate, load_llava
from components.huggingface.layout import DECODING_KEY, TEMPLATE_KEY, TOWER, LlavaFolder, open_llava, preprocessing, vision_config
from components.image_modes import Decoding, SquareMode
from components.manifest import seal
from components.projector import MLP
from components.rebuild import rebuild
from components.run_folder import RECIPE, STATE, UNFINISHED, checkpoint_folder
from components.tokenizer import load_tokenizer
from components.vision_tower import OpenClipTower
from components.vlm import LearningRates, VisionLanguageModel


def import_llava(
    weights: str,
    source: Path,
    folder: Path,
    vision_tower: str | None,
    template: str | None,
    decoding: Decoding | None,
    image_mode: SquareMode | None,
) -> None:
    """Make a run of a released LLaVA model.

    Args:
        weights: As the command names the model; the run's recipe names it so.
        source: The folder where it is.
        folder: The new run folder.
        vision_tower: As in the command, like all that follow.
        template: What the model says, where it is None.
        decoding: The same.
        image_mode: The same.

    Raises:
        RecipeError: The model is damaged, incomplete or of another kind.
    """
    llava = open_llava(source, "--weights")
    if llava.layout == "projector":
        raise RecipeError(
            f"--weights: {source} holds a projector alone. Name it as {INITIAL} of a recipe that states tower and decoder."
        )
    if llava.layout == "hugging_face":
        _demand_image_token(weights, llava)
    stated = preprocessing(source)
    recipe = {
        "model": _model_section(llava, weights if looks_like_hub_id(weights) else str(source.resolve()), vision_tower),
        "data": {
            "template": template or llava.config.get(TEMPLATE_KEY) or "vicuna_v1",
            "decoding": decoding or llava.config.get(DECODING_KEY) or "llava",
            "image_mode": image_mode or _image_mode(stated, DECODING_KEY in llava.config) or "pad",
            "max_length": min(2048, getattr(llava.text_config, "max_position_embeddings", 2048)),
        },
    }
    model, _ = rebuild(recipe)
    dtypes = {info.dtype for info in llava.tensors.infos.values()}
    # a tower from elsewhere may have another number format, which rounding would harm
    dtype = dtypes.pop() if len(dtypes) == 1 and llava.holds(TOWER) else torch.float32
    model.demand_vocabulary()
    allocate(model, dtype)
    held = load_llava(model, source, "--weights")
    model.eval()
    try:
        prove_causal(model)
    except RuntimeError as error:
        raise RecipeError(f"--weights: {weights}: {error}") from error
    _write(folder, model, recipe)
    origin = ", ".join(f"{part.replace('_', ' ')} from {'it' if part in held else 'its own weights'}" for part in model.parts)
    print(f"{weights} ({llava.layout.replace('_', ' ')} layout, {str(dtype).removeprefix('torch.')}) is now {folder}: {origin}.")
    print(f'Ask it:              python main.py ask --ckpt {folder} --image PICTURE --question "..."')
    print(f"Train from it:       model.initial_weights: {folder}, with the parts in {checkpoint_folder(folder, 0) / RECIPE}")


def _write(folder: Path, model: VisionLanguageModel, recipe: dict[str, Any]) -> None:
    """The checkpoint of step 0, visible only when it is whole."""
    final = checkpoint_folder(folder, 0)
    unfinished = final.with_name(final.name + UNFINISHED)
    unfinished.mkdir(parents=True)
    try:
        state = {"state_dict": model.state_dict(), "global_step": 0, "epoch": 0, "pytorch-lightning_version": lightning.__version__}
        torch.save(state, unfinished / STATE)
        (unfinished / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
        seal(unfinished, step=0)
        unfinished.rename(final)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _model_section(llava: LlavaFolder, weights: str, vision_tower: str | None) -> dict[str, Any]:
    text: Any = llava.text_config
    defaults = type(text)().to_dict()
    stated = {name: value for name, value in text.to_dict().items() if name in defaults and name not in NOT_ARCHITECTURE}
    keys = {name: value for name, value in stated.items() if value is not None or defaults.get(name) is not None}
    if llava.layout == "hugging_face":
        vision, tower = llava.config["vision_config"], vision_tower or weights
        depth = 2
    else:
        named = vision_tower or llava.config.get("mm_vision_tower")
        if not named:
            raise RecipeError(f"--weights: {llava.folder} does not say which vision tower it has. State --vision_tower.")
        tower = named
        vision = vision_config(fetch(named, "--vision_tower"))
        found = re.fullmatch(r"mlp(\d+)x_gelu", str(llava.config.get("mm_projector_type")))
        if not found:
            raise RecipeError(
                f"--weights: {llava.folder} has a projector of type {llava.config.get('mm_projector_type')}. LLaVA-1.5's is "
                "mlp2x_gelu."
            )
        depth = int(found[1])
    if vision.get("model_type") != "clip_vision_model":
        raise RecipeError(
            f"--weights: {llava.folder} has a {vision.get('model_type')} tower; the command imports CLIP towers. Name the model as "
            f"{INITIAL} of a recipe that states its tower."
        )
    if llava.feature_block is None:
        raise RecipeError(f"--weights: {llava.folder} uses several layers of its tower. LLaVA-1.5 uses one.")
    heads = vision["num_attention_heads"]
    config = {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "head_width": vision["hidden_size"] // heads,
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        "quick_gelu": vision["hidden_act"] == "quick_gelu",
    }
    return {
        "vision_tower": _part(OpenClipTower, config=config, pretrained=tower, feature_layer=llava.feature_block),
        "projector": _part(MLP, depth=depth),
        "decoder": _part(HuggingFaceDecoder, config=keys, tokenizer=weights, weights=None),
        "learning_rates": vars(LearningRates(projector=2e-5, decoder=2e-5)),  # LLaVA-1.5's second stage; nothing trains here
    }


def _part(kind: type, **arguments: Any) -> dict[str, Any]:
    room = ".".join(kind.__module__.split(".")[:2])  # packages re-export their parts
    return {"class_path": f"{room}.{kind.__name__}", "init_args": arguments}


def _demand_image_token(weights: str, llava: LlavaFolder) -> None:
    config = llava.config
    index = config.get("image_token_index", config.get("image_token_id", 32000))
    found = load_tokenizer(weights).convert_tokens_to_ids("<image>")
    if found != index:
        raise RecipeError(
            f"--weights: config.json of {llava.folder} gives <image> the id {index}, its tokenizer {found}. The tokenizer "
            "is not that of the model: fetch both again."
        )


def _image_mode(stated: dict[str, Any], ours: bool) -> SquareMode | None:
    """What the image processor does; of others than our own exports only padding is believed."""
    if stated.get("do_pad"):
        return "pad"
    if not ours:
        return None
    return "crop" if stated.get("do_center_crop") else "squash"
