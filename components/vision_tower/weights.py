"""Pretrained image encoders on disk: files of open_clip, and Hugging Face folders of CLIP, SigLIP and LLaVA models."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from components.errors import RecipeError
from components.named_tensors import (
    NamedTensors,
    Pairing,
    Renamed,
    SafetensorsFiles,
    TensorInfo,
    TorchFiles,
    differences,
    listed,
    weights_in,
)
from components.vision_tower.hugging_face import CLIP, FAMILIES, TABLE, config_problems

_INSIDE = re.compile(r"(?:model\.)?(?:(?:vision_tower\.)+(?:vision_model\.)?|vision_model\.)(.+)")
"""The vision tensors of a model that has others too: CLIP and SigLIP with their text tower, LLaVA in all its layouts."""
_NO_FEATURE = re.compile(r"head\..+|visual_projection\..+|embeddings\.position_ids")
"""Pooling, projection and computed tables: beside the encoder, and of no use to patch features."""
_KIND_OF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "llava": "clip_vision_model"}
"""The encoder of a model whose `vision_config` leaves its type out."""


def open_clip_tensors(file: Path, source: str) -> NamedTensors:
    """The vision tensors of an open_clip checkpoint, named as in an open_clip vision transformer.

    Args:
        file: A whole model, its vision tower alone, or a training checkpoint (`state_dict` inside, perhaps names in `module.`).
        source: What the recipe calls it, for the error message.

    Raises:
        RecipeError: It is damaged, holds code, or holds no named tensors.
    """
    try:
        stored = SafetensorsFiles([file]) if file.suffix == ".safetensors" else _torch_file(file)
    except RecipeError as error:
        raise RecipeError(f"The vision tower's weights '{source}' could not be read as an open_clip checkpoint: {error}") from error
    plain = Renamed(stored, lambda name: name.removeprefix("module."))
    inside = Renamed(plain, lambda name: name.removeprefix("visual.") if name.startswith("visual.") else None)
    return inside if inside.infos else plain


def folder_tensors(
    folder: Path, ours: dict[str, Any], shapes: dict[str, tuple[int, ...]], colors: Mapping[str, tuple[float, ...]], key: str
) -> NamedTensors:
    """The tensors of a folder's image encoder, named as transformers names them, without prefix; none of them is read.

    Args:
        folder: A CLIP, SigLIP or LLaVA folder.
        ours: The `vision_config` that the encoder must have.
        shapes: The tensors that it must have.
        colors: The image_mean and image_std that its processor must have.
        key: The key of the recipe that named the folder.

    Raises:
        RecipeError: The folder holds another encoder or none, with the list of what differs, or it cannot be read.
    """
    problems = _stated_problems(folder, ours, key) + _color_problems(folder, colors)
    if problems:
        raise RecipeError(
            f"{key}: {folder} is not the vision tower of the recipe:\n  {listed(problems)}\nState the model_name or config that "
            "its weights were trained with (QuickGELU: a model_name that ends in -quickgelu, or quick_gelu in config; other "
            "colors: the open_clip tag of these weights)."
        )
    stored = weights_in(folder)
    if stored is None:
        raise RecipeError(
            f"{key}: {folder} holds no model.safetensors and no pytorch_model.bin. Name a CLIP, SigLIP or LLaVA model, a "
            "checkpoint file, or an open_clip tag."
        )
    found = _vision_part(stored)
    if not found.infos:
        named = _json(folder / "config.json").get("mm_vision_tower")
        raise RecipeError(
            f"{key}: {folder} holds no vision tower." + (f" Its config.json names {named}: state that." if named else "")
        )
    demand_fit(found, shapes, TABLE if ours["model_type"] == CLIP.model_type else None, str(folder))
    return found


def demand_fit(found: NamedTensors, shapes: dict[str, tuple[int, ...]], table: str | None, source: str) -> None:
    """Every tensor is there with its shape, and no other.

    Args:
        found: The tensors.
        shapes: What they must be.
        table: The position table that may have been made for another picture size, if any.
        source: What the recipe calls them.

    Raises:
        RecipeError: With the list of what differs.
    """
    there = {name: info.shape for name, info in found.infos.items()}
    if table in there and table in shapes:
        rows, width = (*there[table], 0, 0)[:2]
        is_grid = len(there[table]) == 2 and rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1
        if is_grid and width == shapes[table][1]:
            there[table] = shapes[table]
    if problems := differences(shapes, there):
        raise RecipeError(
            f"The weights '{source}' do not fit the vision tower ({len(problems)} differences). State the model_name or config "
            f"that they were trained with.\n  {listed(problems)}"
        )


class Split(NamedTensors):
    """Our tensors under transformers' names.

    Args:
        source: Tensors under our names.
        pairs: Which of transformers' they hold; all of ours must be in the source.
    """

    def __init__(self, source: NamedTensors, pairs: Iterable[Pairing]) -> None:
        self.where = source.where
        self._source = source
        self._pairs = {name: pair for pair in pairs for name in pair.theirs}
        self.infos = {
            name: TensorInfo(shape, source.infos[self._pairs[name].ours].dtype)
            for name, shape in their_shapes(
                dict.fromkeys(self._pairs.values()), {name: info.shape for name, info in source.infos.items()}
            ).items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor."""
        pair = self._pairs[name]
        return pair.split(self._source.read(pair.ours))[name]


def their_shapes(pairs: Iterable[Pairing], ours: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of transformers' tensors that hold the same numbers as ours."""
    shapes: dict[str, tuple[int, ...]] = {}
    for pair in pairs:
        shape = ours[pair.ours][1 if pair.leading_one else 0 :]
        parts = len(pair.theirs)
        shapes |= dict.fromkeys(pair.theirs, (shape[0] // parts, *shape[1:]) if parts > 1 else shape)
    return shapes


def _torch_file(file: Path) -> TorchFiles:
    try:
        return TorchFiles([file], section="state_dict")
    except RecipeError:  # no training checkpoint, or no checkpoint at all
        return TorchFiles([file])


def _vision_part(stored: NamedTensors) -> NamedTensors:
    mixed = any(_INSIDE.fullmatch(name) for name in stored.infos)
    original = any(".mm_projector." in name or name.endswith("embed_tokens.weight") for name in stored.infos)

    def rename(name: str) -> str | None:
        inside = _INSIDE.fullmatch(name)
        if (mixed or original) and not inside:
            return None
        name = inside[1] if inside else name
        return None if _NO_FEATURE.fullmatch(name) else name

    return Renamed(stored, rename)


def _stated_problems(folder: Path, ours: dict[str, Any], key: str) -> list[str]:
    config = _json(folder / "config.json")
    stated = config.get("vision_config", config)
    if not isinstance(stated, dict):
        raise RecipeError(f"{folder / 'config.json'}: vision_config is no dictionary. Fetch it again.")
    if stated is config and "mm_vision_tower" in config:
        # LLaVA's first layout says only where the encoder came from; OpenAI's have QuickGELU
        origin = str(config["mm_vision_tower"])
        there = "quick_gelu" if "openai/clip-" in origin else ours["hidden_act"]
        return [] if there == ours["hidden_act"] else [f"hidden_act: {there} there ({origin}), {ours['hidden_act']} in the recipe"]
    named = str(stated.get("model_type") or config.get("model_type"))
    kind = _KIND_OF.get(named, named)
    if kind not in FAMILIES:
        raise RecipeError(f"{key}: {folder} is a {kind} model (config.json). Name a CLIP, SigLIP or LLaVA model.")
    if kind != ours["model_type"]:
        return [f"model_type: {kind} there, {ours['model_type']} in the recipe"]
    return config_problems(stated, ours)


def _color_problems(folder: Path, colors: Mapping[str, tuple[float, ...]]) -> list[str]:
    """What a folder's image processor, which transformers 4 and 5 write into different files, says of colors."""
    problems = []
    for name in ("preprocessor_config.json", "processor_config.json"):
        stated = _json(folder / name) if (folder / name).is_file() else {}
        stated = stated.get("image_processor") or stated
        for field, ours in colors.items():
            if (theirs := stated.get(field)) is None:
                continue
            theirs = theirs if isinstance(theirs, list) else [theirs] * len(ours)  # one number is that of every channel
            if not (len(theirs) == len(ours) and all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(theirs, ours, strict=True))):
                problems.append(f"{field}: {tuple(theirs)} in {name}, {tuple(ours)} in the recipe")
    return problems


def _json(file: Path) -> dict[str, Any]:
    try:
        stated = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise RecipeError(f"{file} does not exist. Name a Hugging Face folder, or fetch it again.") from error
    except ValueError as error:
        raise RecipeError(f"{file} is not JSON: {error}. Fetch it again.") from error
    if not isinstance(stated, dict):
        raise RecipeError(f"{file} is no dictionary. Fetch it again.")
    return stated
